"""Sending: every event that a job asked for arrives, if need be after retries, and the process stops cleanly."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from rq.job import Job as RqJob
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from service.local.redis_server import RedisServer
from service.settings import Settings
from service.store import keys, workers
from service.store.connection import connect
from service.store.jobs import JobStore
from service.webhooks.worker import Sender
from tests.conftest import serving
from tests.paths import ROOT
from tests.service.processes import until
from tests.service.webhooks.conftest import SECRET, Receiver, create_job, outbox, verified


@contextmanager
def webhook_process(environment: dict[str, str], log: IO[str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run the process that sends webhooks. `log` receives its stderr."""
    line = [sys.executable, "-m", "service", "webhooks"]
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_process_sends_webhooks_of_the_apis_jobs_and_retries(
    start: Callable[..., Receiver], hooked: Settings, store: JobStore
) -> None:
    receiver = start(500, 204)
    names = ("redis_url", "webhook_allow_private", "webhook_backoff_s")
    environment = {**os.environ, **{f"LABELGRID_{name.upper()}": str(getattr(hooked, name)) for name in names}}
    environment["LABELGRID_WEBHOOK_SECRET"] = SECRET
    workers.announce(store.connection, "w", {"host": "another"}, lease_s=60)
    with webhook_process(environment) as process:
        with serving(hooked) as client:
            body = {"labels": [["red cube"]], "webhook": receiver.url}
            job_id = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()["id"]
            job = client.delete(f"/jobs/{job_id}").json()
            until(lambda: len(receiver.got()) == 2 and not outbox(store))
        for message in receiver.got():  # the receiver refused the first
            content = verified(message)
            assert (content["type"], content["data"]) == ("job.cancelled", job)
            assert message["path"] == "/hook?x=1"
            assert message["headers"]["webhook-id"] == f"{job_id}.cancelled"
            assert message["headers"]["host"] == f"127.0.0.1:{receiver.port}"
        check = [sys.executable, "-m", "service", "check"]
        assert subprocess.run(check, cwd=ROOT, env=environment).returncode == 0
        process.terminate()
        assert process.wait(timeout=30) == 0
        assert subprocess.run(check, cwd=ROOT, env=environment).returncode == 1


def test_the_process_survives_without_redis_and_stops_cleanly(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lg-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        environment = {**os.environ, "LABELGRID_REDIS_URL": server.url, "LABELGRID_WEBHOOK_SECRET": SECRET}
        log_file = tmp_path / "log"
        try:
            with log_file.open("w") as log, webhook_process(environment, log) as process:
                with connect(server.url) as connection:
                    until(lambda: connection.scard("rq:workers"))
                server.stop()
                until(lambda: "Redis is away" in log_file.read_text() or process.poll() is not None)
                assert process.poll() is None
                process.terminate()
                assert process.wait(timeout=20) == 0
        finally:
            server.stop()


def test_only_the_events_that_a_job_asked_for_are_in_the_outbox(store: JobStore) -> None:
    first, second = create_job(store, "http://x/", ("running", "failed")), create_job(store, "http://x/")
    for job_id in (first, second):
        store.begin(job_id)
    assert outbox(store) == [f"{first} running"]
    store.cancel(first)
    store.fail(second, "why")
    assert set(outbox(store)) == {f"{first} running", f"{second} failed"}
    assert store.webhooks.count == 2


@pytest.mark.parametrize(
    ("statuses", "attempts"), [((200,), 1), ((503, 500, 200), 3), ((500,), 3), ((410,), 1), ((307, 200), 2)]
)
def test_a_refused_message_is_retried_a_few_times(
    start: Callable[..., Receiver], store: JobStore, sender: Sender, statuses: tuple[int, ...], attempts: int
) -> None:
    receiver = start(*statuses)
    store.cancel(job_id := create_job(store, receiver.url))
    waits_s = []
    for _ in range(5):
        before = time.time()
        sender.attempt(job_id, "cancelled")
        if outbox(store):
            waits_s.append(store.connection.zscore(keys.WEBHOOKS, outbox(store)[0]) - before)
    assert len(receiver.got()) == attempts
    assert outbox(store) == []
    assert {message["path"] for message in receiver.got()} == {"/hook?x=1"}  # no redirect is followed
    for i, wait_s in enumerate(waits_s):
        assert 0.05 * 4**i <= wait_s < 1.25 * 0.05 * 4**i + 1  # 1 s for the attempt itself


def test_a_receiver_that_does_not_answer_is_abandoned_and_retried(
    start: Callable[..., Receiver], store: JobStore, sender: Sender
) -> None:
    receiver = start(0)
    store.cancel(job_id := create_job(store, receiver.url))
    sender.attempt(job_id, "cancelled")
    assert len(receiver.got()) == 1
    assert outbox(store) == [f"{job_id} cancelled"]


def test_an_attempt_that_rq_lost_is_queued_again_once_it_is_due(store: JobStore, sender: Sender) -> None:
    store.cancel(job_id := create_job(store, "http://x/"))
    rq_job = RqJob.fetch(f"{job_id}-cancelled", connection=store.connection, serializer=JSONSerializer)
    assert store.webhooks.count == 1
    rq_job.delete()
    store.connection.delete(store.webhooks.key)
    sender.queue_due()
    assert store.webhooks.count == 0  # whoever cancelled the job may be about to queue it
    store.connection.zadd(keys.WEBHOOKS, {f"{job_id} cancelled": time.time() - 1})
    for _ in range(3):
        sender.queue_due()
        assert store.webhooks.count == 1


def test_an_attempt_whose_worker_died_is_queued_again(store: JobStore, sender: Sender) -> None:
    store.cancel(job_id := create_job(store, "http://x/"))
    rq_job = RqJob.fetch(f"{job_id}-cancelled", connection=store.connection, serializer=JSONSerializer)
    store.connection.delete(store.webhooks.key)
    FailedJobRegistry(queue=store.webhooks).add(rq_job, ttl=rq_job.failure_ttl)  # as RQ does
    store.connection.zadd(keys.WEBHOOKS, {f"{job_id} cancelled": time.time() - 1})
    until(lambda: sender.queue_due() or store.webhooks.count == 1, timeout_s=5)


def test_a_request_with_an_impossible_webhook_is_refused(settings: Settings, hooked: Settings, store: JobStore) -> None:
    workers.announce(store.connection, "w", {}, store.settings.lease_s)
    cases = [
        (settings, {"webhook": "http://example.com/"}, "this service has no webhooks"),
        (settings, {"webhook_events": ["finished"]}, "has no effect without webhook"),
        (hooked, {"webhook": "file:///etc/passwd"}, "not an http:// or https:// URL"),
        (hooked, {"webhook": "http://example.com/", "webhook_events": ["begun"]}, "'running', 'finished'"),
        (hooked, {"webhook": "http://example.com/", "webhook_events": []}, "at least 1"),
    ]
    for chosen, fields, words in cases:
        with serving(chosen) as client:
            answer = client.post("/generate", json={"labels": [["red cube"]], **fields})
        assert (answer.status_code, words in answer.json()["detail"]) == (422, True), answer.text
    assert store.connection.scard("labelgrid:open") == 0
