"""Breaks a real service in one way for each alert, and waits until Alertmanager has told pager or chat.

`make alert-drill`. Prometheus, Alertmanager and their files are those of deploy/monitoring, but for addresses and for
times, which are seconds here. Redis, the API and workers are real processes on loopback, with toy checkpoints. Needs
the programs prometheus and prometheus-alertmanager, such as Debian's.
"""

import contextlib
import json
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from faults.harness import Stack, until
from service.client import Client
from service.contract.schemas import Job
from service.local.demo import free_port
from service.local.redis_server import die_with_parent, stop
from service.store.workers import list_live

MONITORING = Path(__file__).parent / "monitoring"
RULES: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
BY_NAME = {rule["alert"]: rule for rule in RULES}
SCRAPE_S, FOR_S = 1, 3
SHORTER = {"> 60": "> 5", "[10m]": "[20s]", "[5m]": "[20s]"}  # in expressions
STALLED_AFTER_S = 16
PATIENCE_S = 240.0  # on a busy machine; each wait takes seconds
FAILS, HANGS = ["purple cube"], ["purple cylinder"]  # what `faults.poisoned` makes of these labels


@dataclass
class Told:
    """What pager and chat get from Alertmanager: the path that was called, and one alert."""

    alerts: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # of the current test
    seen: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        alerts = self.alerts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                for alert in json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"]:
                    alerts.append((self.path, alert))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()

    def wait(self, name: str, status: str, **labels: str) -> None:
        """Wait until pager or chat, whichever the alert's severity asks for, is told of it."""

        def told() -> tuple[str, dict[str, Any]] | None:
            for path, alert in list(self.alerts):
                about = alert["labels"]
                if (about["alertname"], alert["status"]) == (name, status) and labels.items() <= about.items():
                    return path, alert
            return None

        path, alert = until(told, f"the alert {name} to be {status}", PATIENCE_S)
        rule = BY_NAME[name]
        assert path == {"critical": "/pager", "warning": "/chat"}[rule["labels"]["severity"]]
        assert alert["annotations"]["runbook_url"] == rule["annotations"]["runbook_url"]
        self.seen.add(name)


@dataclass
class Drill:
    folder: Path
    stack: Stack
    client: Client
    told: Told
    prometheus: str
    ports: dict[str, int] = field(default_factory=dict)  # of workers' metrics

    def workers(self, *names: str) -> None:
        """List these workers as those that Prometheus scrapes."""
        targets = [f"127.0.0.1:{self.ports[name]}" for name in names]
        (self.folder / "workers.part").write_text(json.dumps([{"targets": targets}]))
        (self.folder / "workers.part").rename(self.folder / "workers.json")

    def start_worker(self, name: str) -> None:
        self.ports[name] = free_port()
        port = str(self.ports[name])
        self.stack.run(name, "faults.poisoned worker", LABELGRID_METRICS_PORT=port)

    def alive(self, count: int) -> None:
        until(lambda: len(list_live(self.stack.store.connection)) == count, f"{count} workers", PATIENCE_S)

    def down(self, name: str) -> None:
        """Kill a process, which nothing restarts."""
        self.stack.held.add(name)
        self.stack.children[name].process.kill()
        self.stack.children[name].process.wait()

    def up(self, name: str) -> None:
        """Let it be restarted."""
        self.stack.held.discard(name)

    def ask(self, expression: str) -> list[float]:
        """Return the values of a query."""
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}).raise_for_status()
        return [float(one["value"][1]) for one in answer.json()["data"]["result"]]

    def quiet(self) -> list[str]:
        """Return which alerts fire while ten more scrapes of the API are made."""
        scrapes, before = 'count_over_time(up{job="labelgrid-api"}[%ds])', time.time()
        until(lambda: self.ask(scrapes % (time.time() - before + 1)) >= [10.0], "ten scrapes", PATIENCE_S)
        return self.firing()

    def firing(self) -> list[str]:
        alerts = httpx.get(f"{self.prometheus}/api/v1/alerts").raise_for_status().json()["data"]["alerts"]
        return [alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"]

    def fires(self, name: str, **labels: str) -> None:
        self.told.wait(name, "firing", **labels)

    def ends(self, name: str) -> None:
        self.told.wait(name, "resolved")

    def post(self, labels: list[list[str]], steps: int = 2) -> Job:
        return self.client.generate(labels, steps=steps, wait=False)


def write_configurations(folder: Path, api: str, alertmanager: str, receiver: str) -> None:
    """Write the files of deploy/monitoring with this drill's addresses and times."""
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        for longer, shorter in SHORTER.items():
            rule["expr"] = rule["expr"].replace(longer, shorter)
        if "for" in rule:
            rule["for"] = f"{FOR_S}s"
    prometheus = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    prometheus["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), f"{SCRAPE_S}s")
    [manager] = prometheus["alerting"]["alertmanagers"]
    manager["static_configs"] = [{"targets": [alertmanager]}]
    first, second = prometheus["scrape_configs"]
    first["static_configs"] = [{"targets": [api]}]
    del second["dns_sd_configs"]
    second["file_sd_configs"] = [{"files": [str(folder / "workers.json")]}]
    text = (MONITORING / "alertmanager.yml").read_text()
    pager = yaml.safe_load(re.sub(r"https://(pager|chat)\.example\.org/", rf"{receiver}/\1", text))
    pager["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    for name, content in (("alerts", rules), ("prometheus", prometheus), ("alertmanager", pager)):
        (folder / f"{name}.yml").write_text(yaml.safe_dump(content))


@contextlib.contextmanager
def program(folder: Path, address: str, *line: str) -> Iterator[None]:
    """Run a program in `folder`, and wait until its address says that it is ready."""
    with (folder / f"{line[0]}.log").open("w") as log:
        process = subprocess.Popen(line, cwd=folder, stdout=log, stderr=log, preexec_fn=die_with_parent)

        def ready() -> bool:
            assert process.poll() is None, (folder / f"{line[0]}.log").read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://{address}/-/ready").status_code == 200
            return False

        try:
            until(ready, line[0], PATIENCE_S)
            yield
        finally:
            stop(process)


@pytest.fixture(scope="module")
def drill() -> Iterator[Drill]:
    environment = {
        "LABELGRID_ACCEPT_WITHOUT_WORKERS": "true",
        "LABELGRID_STALLED_AFTER_S": str(STALLED_AFTER_S),
        "LABELGRID_LEASE_S": "4",
        "LABELGRID_HEARTBEAT_S": "0.5",
    }
    with tempfile.TemporaryDirectory(prefix="lg-drill-") as name, contextlib.ExitStack() as cleanup:
        folder = Path(name)
        stack = Stack(folder, environment, clocks=False)
        cleanup.callback(stack.stop)
        stack.start(0, "")
        told = Told()
        receiver = cleanup.enter_context(told.listening())
        alertmanager, prometheus = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        client = cleanup.enter_context(Client(stack.address))
        one = Drill(folder, stack, client, told, f"http://{prometheus}")
        one.workers()
        write_configurations(folder, f"127.0.0.1:{stack.port}", alertmanager, receiver)
        manages = [
            "--config.file=alertmanager.yml",
            f"--web.listen-address={alertmanager}",
            "--cluster.listen-address=",
        ]
        cleanup.enter_context(
            program(folder, alertmanager, "prometheus-alertmanager", *manages, f"--storage.path={folder}/alertmanager")
        )
        scrapes = ["--config.file=prometheus.yml", f"--web.listen-address={prometheus}"]
        cleanup.enter_context(
            program(folder, prometheus, "prometheus", *scrapes, f"--storage.tsdb.path={folder}/prometheus")
        )
        yield one


@pytest.fixture(autouse=True)
def _earlier_alerts_are_forgotten(drill: Drill) -> None:
    drill.told.alerts.clear()


def test_no_worker_is_no_alert_while_they_start_on_demand_and_nothing_waits(drill: Drill) -> None:
    assert drill.quiet() == []
    assert drill.ask("labelgrid_workers") == [0.0]


def test_pictures_wait_and_no_worker_starts(drill: Drill) -> None:
    job = drill.post([["red cube"]])
    drill.fires("LabelgridNoWorkerStarts")
    for name in ("worker 0", "worker 1"):
        drill.start_worker(name)
    drill.workers("worker 0", "worker 1")
    drill.alive(2)
    drill.ends("LabelgridNoWorkerStarts")
    assert drill.client.wait(job.id).status == "finished"


def test_the_api_is_killed(drill: Drill) -> None:
    drill.stack.environment["LABELGRID_ACCEPT_WITHOUT_WORKERS"] = "false"  # from its next start on
    drill.down("api")
    drill.fires("LabelgridApiDown")
    drill.fires("LabelgridProcessDown", job="labelgrid-api")
    drill.up("api")
    drill.ends("LabelgridApiDown")
    drill.ends("LabelgridProcessDown")


def test_nothing_fires_while_all_is_well(drill: Drill) -> None:
    drill.client.generate([["red cube"]], steps=2)
    assert drill.quiet() == []
    assert drill.ask("labelgrid_workers") == [2.0]


def test_one_of_two_workers_is_killed(drill: Drill) -> None:
    drill.down("worker 0")
    drill.fires("LabelgridProcessDown", instance=f"127.0.0.1:{drill.ports['worker 0']}")
    drill.up("worker 0")
    drill.alive(2)
    drill.ends("LabelgridProcessDown")


def test_one_of_two_workers_is_paused(drill: Drill) -> None:
    drill.stack.signal("worker 1", signal.SIGSTOP)
    drill.fires("LabelgridProcessDown", instance=f"127.0.0.1:{drill.ports['worker 1']}")
    drill.stack.signal("worker 1", signal.SIGCONT)
    drill.ends("LabelgridProcessDown")


def test_the_last_worker_is_killed(drill: Drill) -> None:
    drill.down("worker 0")
    drill.down("worker 1")
    drill.fires("LabelgridNoWorker")
    drill.up("worker 0")
    drill.up("worker 1")
    drill.alive(2)
    drill.ends("LabelgridNoWorker")


def test_a_worker_hangs(drill: Drill) -> None:
    job = drill.post([HANGS])
    drill.fires("LabelgridWorkerHangs")
    drill.client.cancel(job.id)
    drill.ends("LabelgridWorkerHangs")


def test_pictures_cannot_be_stored(drill: Drill) -> None:
    """A file lies where the folder was, which stops root, too."""
    drill.alive(2)
    pictures = drill.folder / "pictures"
    pictures.rename(drill.folder / "elsewhere")
    pictures.touch()
    job = drill.post([["red cube"]])
    drill.fires("LabelgridStorageDown")
    pictures.unlink()
    (drill.folder / "elsewhere").rename(pictures)
    drill.ends("LabelgridStorageDown")
    assert drill.client.wait(job.id).status == "finished"


def test_the_queue_is_slow(drill: Drill) -> None:
    job = drill.post([["red cube"]] * 256, steps=1000)
    drill.fires("LabelgridSlowQueue", model="toy")
    drill.client.cancel(job.id)
    drill.ends("LabelgridSlowQueue")


def test_jobs_fail(drill: Drill) -> None:
    done = threading.Event()

    def keep_failing() -> None:
        while not done.is_set():
            drill.post([FAILS])
            time.sleep(1)

    thread = threading.Thread(target=keep_failing)
    thread.start()
    try:
        drill.fires("LabelgridJobsFail")
    finally:
        done.set()
        thread.join()
    for _ in range(3):
        drill.client.generate([["red cube"]], steps=2)
    drill.ends("LabelgridJobsFail")


def test_redis_stops(drill: Drill) -> None:
    drill.down("redis")
    with httpx.Client(base_url=drill.stack.address, timeout=30) as asking:

        def fails() -> bool:
            assert asking.post("/generate", json={"labels": [["red cube"]]}).status_code == 503
            return "LabelgridServerErrors" in drill.firing()

        until(fails, "errors", PATIENCE_S, every_s=0.5)
    drill.fires("LabelgridRedisDown")
    drill.fires("LabelgridServerErrors")
    drill.up("redis")
    drill.ends("LabelgridRedisDown")


def test_every_alert_has_fired(drill: Drill) -> None:
    assert drill.told.seen == set(BY_NAME)
