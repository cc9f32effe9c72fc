"""Metrics report what happened; dashboard and alerts use only names that exist."""

import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from service.settings import Settings
from service.store import workers
from service.store.async_jobs import AsyncJobs
from service.store.claims import PictureStream
from service.store.jobs import JobStore
from service.telemetry.metrics import API, WORKER, WorkerState, serve_worker
from shared.checkpoint import read_info
from shared.registry import resolve
from shared.vocabulary import Vocabulary
from tests.conftest import serving
from tests.paths import ROOT
from tests.service.store.helpers import add_job, record
from tests.service.worker.conftest import model_of, run, settle, started
from tests.toy_checkpoint import publish_toy_evaluator

MONITORING = ROOT / "deploy/monitoring"
PROMTOOL = shutil.which("promtool")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Reading:
    """The samples of one scrape."""

    def __init__(self, exposition: str) -> None:
        self.samples: Samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(exposition)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples.get((f"labelgrid_{name}", frozenset(labels.items())), 0.0)


def worker_reading() -> Reading:
    return Reading(generate_latest(WORKER).decode())


def test_the_api_reports_requests_and_its_queue(client: httpx.Client, connection: Redis, settings: Settings) -> None:
    def read() -> Reading:
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return Reading(answer.text)

    store = JobStore(connection, settings.model_copy(update={"lease_s": 60}))
    before = read()
    assert before("workers") == before("workers_on_demand") == before("open_jobs") == before("open_pictures") == 0
    workers.announce(store.connection, "w", {}, store.settings.lease_s)
    body = {"labels": [["red cube"]] * 3, "steps": 2, "guidance": 2.0}
    job = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()
    client.get(f"/jobs/{job['id']}")
    client.get("/jobs/nothing")
    client.get("/nowhere")
    httpx.head(client.base_url.join("/labels"))
    after = read()

    def new(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    assert new("http_requests_total", method="POST", route="/generate", status="202") == 1
    assert new("http_requests_total", method="GET", route="/jobs/{job_id}", status="200") == 1
    assert new("http_requests_total", method="GET", route="/jobs/{job_id}", status="404") == 1
    assert new("http_requests_total", method="GET", route="other", status="404") == 1
    assert new("http_requests_total", method="HEAD", route="/labels", status="200") == 1
    assert new("http_request_seconds_count", method="POST", route="/generate") == 1
    assert new("pictures_accepted_total", kind="generate") == 3
    assert after("http_requests_in_work") == 1  # the one that reads it
    assert after("workers") == after("open_jobs") == after("redis_up") == 1
    assert after("waiting_pictures", model="toy") == after("open_pictures") == 3
    assert after("oldest_wait_seconds", model="toy") > 0
    started(connection, settings).run_once()
    begun = read()
    assert begun("waiting_pictures", model="toy") == begun("oldest_wait_seconds", model="toy") == 0
    assert begun("open_pictures") == 3
    client.post(f"/jobs/{job['id']}/cancel")
    assert read()("jobs_ended_total", status="cancelled") - after("jobs_ended_total", status="cancelled") == 1


def test_a_redis_that_hangs_does_not_hold_up_the_metrics(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prometheus would take the API for down."""
    monkeypatch.setattr("service.api.routes.metrics.REDIS_WITHIN_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with serving(settings.model_copy(update={"redis_url": url})) as client:
            begun = time.monotonic()
            found = Reading(client.get("/metrics").text)
            assert time.monotonic() - begun < 5
    assert found.samples["labelgrid_redis_up", frozenset()] == 0


def test_a_model_whose_figures_cannot_be_read_hides_no_other(
    client: httpx.Client, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = [{"name": name, "digest": digit * 64} for name, digit in (("bad", "e"), ("good", "f"))]
    workers.announce(connection, "w", {"models": loaded}, lease_s=60)

    async def longest_wait_s(self: AsyncJobs, digest: str) -> float:
        if digest.startswith("e"):
            raise OverflowError
        return 7.0

    monkeypatch.setattr(AsyncJobs, "longest_wait_s", longest_wait_s)
    found = Reading(client.get("/metrics").text)
    assert found("workers") == found("redis_up") == 1
    assert found("oldest_wait_seconds", model="good") == found("oldest_wait_seconds", model="toy") == 7.0
    assert found("oldest_wait_seconds", model="bad") == 0


def test_pictures_count_of_any_evaluator_and_of_a_checkpoint_that_was_replaced(
    client: httpx.Client, connection: Redis, settings: Settings
) -> None:
    loaded = [{"name": "gone", "digest": "f" * 64}]
    workers.announce(connection, "w", {"models": loaded}, lease_s=60)
    publish_toy_evaluator(settings.storage, "own-evaluator", Vocabulary(["sky", "boat"]))
    store, judge = JobStore(connection, settings), read_info(resolve(settings.storage, "own-evaluator", "evaluator"))
    add_job(store, record(2, digest=judge.digest))
    add_job(store, record(3, digest="f" * 64))
    for digest in (judge.digest, "f" * 64):
        store.claim_new(PictureStream(connection, settings, digest, "w"), 1)
    found = Reading(client.get("/metrics").text)
    (settings.storage / "own-evaluator.safetensors").unlink()  # other tests have the same storage
    assert found("waiting_pictures", model="own-evaluator") == 1
    assert found("waiting_pictures", model="gone") == 2
    assert found("open_pictures") == 5  # those that a worker has claimed, too


def test_a_worker_reports_its_pictures_and_steps(client: httpx.Client, connection: Redis, settings: Settings) -> None:
    workers.announce(connection, "w", {}, lease_s=60)
    runner = started(connection, settings)
    before = worker_reading()
    body = {"labels": [["red cube"]] * 3, "steps": 4, "guidance": 2.0}
    job = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()
    run(runner, job["id"])
    settle(runner)
    after = worker_reading()

    def new(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    assert new("pictures_total", model="toy", outcome="made") == 3
    assert new("network_rows_total", model="toy") == 3 * 4 * 2  # with labels and without
    assert new("step_seconds_count", model="toy") == new("step_pictures_count", model="toy") == 4
    assert new("step_pictures_sum", model="toy") == 3 * 4
    assert new("picture_wait_seconds_count", model="toy") == 3
    assert 0 < new("picture_wait_seconds_sum", model="toy") < 60
    assert new("jobs_ended_total", status="finished") == 1


def test_a_workers_metrics_are_served(connection: Redis, settings: Settings) -> None:
    runner = started(connection, settings)
    model = model_of(runner)
    port = serve_worker(runner, "127.0.0.1", 0)
    read = Reading(httpx.get(f"http://127.0.0.1:{port}/metrics").text)
    assert read("worker_up", device="cpu") == 1
    assert read("model_loaded", model="toy", digest=model.digest) == 1
    assert read("batch_limit_pictures", model="toy") == settings.batch_pictures == 8
    assert read("storage_up") == 1
    runner.watchdog.moved_at -= settings.stalled_after_s / 2 + 1
    runner.storage.problem = "no space left"
    later = Reading(httpx.get(f"http://127.0.0.1:{port}/metrics").text)
    assert later("worker_up", device="cpu") == later("storage_up") == 0


def idle_worker(models: list[SimpleNamespace]) -> SimpleNamespace:
    return SimpleNamespace(
        device="cpu", watchdog=SimpleNamespace(stalled=False), models=models, storage=SimpleNamespace(problem="")
    )


def known_names() -> set[str]:
    """Return the names of all samples of API and workers."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    families = [family for registry in (API, WORKER) for family in registry.collect()]
    families += WorkerState(idle_worker([])).collect()
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def queries() -> list[str]:
    """Return every expression in dashboard and alerts."""
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return asked + [rule["expr"] for group in groups for rule in group["rules"]]


def test_dashboard_and_alerts_use_existing_metrics() -> None:
    named = {name for query in queries() for name in re.findall(r"\blabelgrid_\w+", query)}
    assert len(named) > 10
    assert named <= known_names()


def test_every_metric_is_documented_with_its_labels() -> None:
    page = (ROOT / "docs/monitoring.md").read_text()
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known_names()}
    assert [name for name in sorted(shown) if f"`{name}`" not in page] == []
    for name, metric in {**API._names_to_collectors, **WORKER._names_to_collectors}.items():
        for line in page.splitlines():
            if f"`{name}`" in line:
                assert [label for label in getattr(metric, "_labelnames", ()) if f"`{label}`" not in line] == [], name


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package promtool)")
def test_promtool_accepts_and_tests_the_rules(tmp_path: Path) -> None:
    def promtool(*arguments: str, cwd: Path = MONITORING) -> None:
        done = subprocess.run([str(PROMTOOL), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "alerts_test.yml")
    asked = [{"record": f"q:{i}", "expr": q.replace("$__rate_interval", "5m")} for i, q in enumerate(queries())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": asked}]}))
    promtool("check", "rules", "queries.yml", cwd=tmp_path)
