"""Shutdowns: work in progress is finished or handed over, new requests are refused, and nothing is lost."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from redis import Redis

from service.local.demo import free_port
from service.settings import Settings
from service.store import keys, workers
from service.store.claims import GROUP
from service.store.connection import text
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.conftest import api_server, client_of, serving
from tests.paths import ROOT
from tests.service.api.test_events import events, read
from tests.service.processes import environment, new_job, until, until_it_answers
from tests.service.store.helpers import add_job
from tests.service.worker.conftest import run, started

BODY = {"labels": [["red cube"], ["blue sphere"]], "steps": 2}
ASYNC = {"prefer": "respond-async"}


@pytest.fixture
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let waiting requests notice a shutdown at once."""
    monkeypatch.setattr("service.store.reader.LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr("service.api.events.LOOK_AGAIN_S", 0.05)


def is_refused(client: httpx.Client) -> bool:
    """Whether the API takes no new connection."""
    try:
        client.get("/healthz")
    except httpx.TransportError:
        return True
    return False


def test_a_draining_api_answers_open_requests_and_refuses_new_ones(
    settings: Settings, connection: Redis, alive: JobStore, quick_look: None
) -> None:
    with (
        api_server(settings.model_copy(update={"drain_s": 120.0})) as server,
        client_of(server) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        waiting = thread.submit(client.post, "/generate", json=BODY)
        (raw,) = until(lambda: connection.zrange(keys.OPEN, 0, -1))
        job_id = text(raw)
        with client.stream("GET", f"/jobs/{job_id}/events") as response:
            stream = events(response)
            assert next(stream)["event"] == "job"
            server.should_exit = True
            assert list(stream) == []  # the stream has ended, the job has not
        until(lambda: is_refused(client))  # an orchestrator or proxy then asks another process
        assert connection.zrange(keys.OPEN, 0, -1) == [raw]
        assert not waiting.done()
        run(Runner(connection, settings, "w"), job_id)
        answer = waiting.result(timeout=60)
        assert (answer.status_code, answer.json()["status"]) == (200, "finished")
    with serving(settings) as elsewhere:
        kinds = [event["event"] for event in read(elsewhere, job_id) if event["event"] != "steps"]
        assert kinds == ["job", "status", "picture", "picture", "end"]


def test_at_the_deadline_waiting_requests_are_answered_with_the_jobs_address(
    settings: Settings, connection: Redis, alive: JobStore, quick_look: None
) -> None:
    openai = {"prompt": "red cube"}
    with (
        api_server(settings.model_copy(update={"drain_s": 0.0})) as server,
        client_of(server) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        waiting = threads.submit(client.post, "/generate", json=BODY)
        waiting_at_v1 = threads.submit(client.post, "/v1/images/generations", json=openai)
        until(lambda: connection.zcard(keys.OPEN) == 2)
        server.should_exit = True
        answer = waiting.result(timeout=60)
        assert (answer.status_code, answer.json()["status"]) == (202, "queued")
        assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
        late = waiting_at_v1.result(timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "not_in_time")
    assert connection.zcard(keys.OPEN) == 2


def test_a_draining_worker_counts_as_none(client: httpx.Client, alive: JobStore) -> None:
    assert client.get("/readyz").status_code == 200
    workers.announce(alive.connection, "w", {"draining": True}, lease_s=60)
    for answer in (client.get("/readyz"), client.post("/generate", json=BODY)):
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:labelgrid:problem:no-worker"


def test_a_draining_worker_finishes_what_fits_and_releases_the_rest_at_once(
    settings: Settings, connection: Redis
) -> None:
    patient = settings.model_copy(update={"lease_s": 600.0})  # longer than the test may take
    store, runner = JobStore(connection, patient), started(connection, patient, "a")
    short, long, late = (new_job(settings, steps=steps, pictures=2) for steps in (5, 200, 5))
    add_job(store, short)
    add_job(store, long)
    runner.run_once()
    add_job(store, late)
    runner.iteration_s = 1.0  # as measured on a slower network
    runner.stop(within_s=60)
    runner.drain()
    assert not runner.busy
    assert store.statuses([short.id, long.id, late.id]) == {short.id: "finished", long.id: "running", late.id: "queued"}
    assert store.done_count(long.id) == 0
    pending: Any = connection.xpending_range(keys.stream(long.digest), GROUP, "-", "+", 9)
    assert [one["times_delivered"] for one in pending] == [0, 0]  # as if never delivered
    run(Runner(connection, patient, "b"), long.id, late.id)  # without waiting for a lease to expire
    assert set(store.statuses([long.id, late.id]).values()) == {"finished"}


@pytest.mark.parametrize("within_s", [0.0, -1.0])
def test_without_time_to_drain_everything_is_released(settings: Settings, connection: Redis, within_s: float) -> None:
    store, runner = JobStore(connection, settings), started(connection, settings)
    job = new_job(settings, steps=2, pictures=2)
    add_job(store, job)
    runner.run_once()
    assert runner.models.busy
    runner.stop(within_s)
    runner.drain()
    assert not runner.models.busy
    assert store.done_count(job.id) == 0


# Real processes: all are replaced while clients send requests.


class Part:
    """A process of the service, with its log."""

    def __init__(self, folder: Path, settings: Settings, name: str, *arguments: str) -> None:
        self.log = folder / f"{name}.log"
        variables = {**environment(settings), "LABELGRID_LOG_FORMAT": "json", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "service", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=log)

    def lines(self, **wanted: Any) -> list[dict[str, Any]]:
        text = self.log.read_text()
        assert all(line.startswith("{") for line in text.splitlines()), text
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if wanted.items() <= line.items()]


class Traffic(threading.Thread):
    """Sends small jobs until it is ended, each to one API after the other until one accepts it."""

    def __init__(self, addresses: list[str]) -> None:
        super().__init__()
        self.addresses, self.ended = addresses, threading.Event()
        self.accepted = dict[str, tuple[str, str]]()  # job and address, by request
        self.refused = Counter[int]()  # status, 0 for no connection

    def run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self.ended.wait(0.05):
                request = f"request-{len(self.accepted)}"
                headers = {**ASYNC, "x-request-id": request, "idempotency-key": request}
                for address in self.addresses:
                    try:
                        answer = client.post(f"{address}/generate", json={**BODY, "steps": 10}, headers=headers)
                    except httpx.TransportError:
                        self.refused[0] += 1
                        continue
                    if answer.status_code == 202:
                        self.accepted[request] = answer.json()["id"], address
                        break
                    self.refused[answer.status_code] += 1


def workers_with_pictures(connection: Redis, digest: str) -> set[int]:
    """Return the process ids of the workers with pictures in progress."""
    with contextlib.suppress(redis.ResponseError):  # no worker has created the stream yet
        names = [text(one["name"]) for one in connection.xpending(keys.stream(digest), GROUP)["consumers"]]
        return {json.loads(about)["pid"] for name in names if (about := connection.get(keys.worker(name)))}
    return set()


def check_once(connection: Redis, job_id: str) -> None:
    """Check that the job finished once, with every picture stored once."""
    happened: Any = connection.xrange(keys.events(job_id))
    fields = [fields for _, fields in happened]
    assert [text(one[b"status"]) for one in fields if b"status" in one] == ["running", "finished"]
    stored = [int(one[b"picture"]) for one in fields if b"picture" in one]
    total = int(connection.hget(keys.job(job_id), "total") or 0)
    assert sorted(stored) == list(range(total))
    assert connection.hlen(keys.verdicts(job_id)) == total


@pytest.fixture
def parts(tmp_path: Path, settings: Settings, connection: Redis) -> Iterator[tuple[list[str], dict[str, Part]]]:
    """Two APIs, by address, and two workers, all ready."""
    brief = settings.model_copy(update={"drain_s": 4.0})
    ports = [free_port(), free_port()]
    started = {f"api{i}": Part(tmp_path, brief, f"api{i}", "api", "--port", str(port)) for i, port in enumerate(ports)}
    started |= {f"worker{i}": Part(tmp_path, brief, f"worker{i}", "worker") for i in range(2)}
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    for i, address in enumerate(addresses):
        both = (started[f"api{i}"].process, f"{address}/readyz")
        until_it_answers(*both, lambda answer: answer.json().get("workers") == 2)
    yield addresses, started
    for part in started.values():
        part.process.kill()
        part.process.wait()


def test_a_rolling_restart_loses_nothing(
    parts: tuple[list[str], dict[str, Part]], connection: Redis, settings: Settings
) -> None:
    addresses, started = parts
    old, new = addresses
    digest = new_job(settings, steps=1, pictures=2).digest
    traffic = Traffic(addresses)
    traffic.start()
    long = {"labels": [["red cube"]] * 6, "steps": 500}
    with httpx.Client(base_url=old, timeout=60) as client, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.post, "/generate", json=long)
        watched = client.post("/generate", json=long, headers=ASYNC).json()["id"]
        with client.stream("GET", f"/jobs/{watched}/events") as response:
            stream = events(response)
            first = [next(stream), next(stream)]
            until(lambda: started["worker0"].process.pid in workers_with_pictures(connection, digest))
            until(lambda: traffic.accepted)  # by the old API, which is asked first
            for name in ("worker0", "api0"):
                started[name].process.send_signal(signal.SIGTERM)
            first += stream
        answer = waiting.result(timeout=60)
    assert started["worker0"].process.wait(timeout=60) == 0
    assert started["api0"].process.wait(timeout=60) == -signal.SIGTERM
    before = len(traffic.accepted)
    until(lambda: len(traffic.accepted) > before)
    traffic.ended.set()
    traffic.join()

    # Every accepted job finishes once, whichever API accepted it and whichever worker sampled it.
    assert answer.status_code in (200, 202)
    jobs = [watched, answer.json()["id"], *(job_id for job_id, _ in traffic.accepted.values())]
    until(lambda: not connection.zcard(keys.OPEN))
    for job_id in jobs:
        check_once(connection, job_id)
    assert {address for _, address in traffic.accepted.values()} == {old, new}
    assert set(traffic.refused) <= {0, 503}

    # The client continues the event stream at the other API.
    assert "end" not in [event["event"] for event in first]
    last = ["0-0", *(event["id"] for event in first if "id" in event)][-1]
    with httpx.Client(base_url=new) as client:
        rest = read(client, watched, after=last)
    indices = [event["data"]["index"] for event in first + rest if event["event"] == "picture"]
    assert sorted(indices) == list(range(6))
    assert rest[-1]["data"]["status"] == "finished"

    # One request's lines in the logs of API and worker have the same ids, and none has the password of Redis.
    for request, (job_id, address) in list(traffic.accepted.items())[-3:]:
        api = started[f"api{addresses.index(address)}"]
        assert api.lines(event="request", role="api", request_id=request, job_id=job_id)
        logged = [part.lines(event="job finished", request_id=request, job_id=job_id) for part in started.values()]
        assert [line["role"] for lines in logged for line in lines] == ["worker"]
    password = settings.redis_url.split("@")[0].rpartition(":")[2]
    assert not any(password in part.log.read_text() for part in started.values())
