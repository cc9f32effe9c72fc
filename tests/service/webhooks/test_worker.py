"""Sending: every event that a job asked for arrives, if need be after retries, and the process stops cleanly."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from service.local.redis_server import RedisServer
from service.settings import Settings
from service.store import keys, workers
from service.store.connection import connect
from service.store.jobs import JobStore
from service.webhooks.turns import RECEIVER_SLOTS
from service.webhooks.worker import Refused, Sender, WebhookWorker
from tests.conftest import serving
from tests.paths import ROOT
from tests.service.conftest import Command
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
    command: Command, start: Callable[..., Receiver], hooked: Settings, store: JobStore
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
        assert command("check", environment=environment)[0] == 0
        process.terminate()
        assert process.wait(timeout=30) == 0
        code, _, err = command("check", environment=environment)
        assert (code, err) == (1, f"labelgrid: no worker of {socket.gethostname()} is alive, or it hangs\n")


def test_the_process_survives_without_redis_and_stops_cleanly(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lg-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        environment = {**os.environ, "LABELGRID_REDIS_URL": server.url, "LABELGRID_WEBHOOK_SECRET": SECRET}
        log_file, alive = tmp_path / "log", tmp_path / "alive"
        environment["LABELGRID_ALIVE_FILE"] = str(alive)
        try:
            with log_file.open("w") as log, webhook_process(environment, log) as process:
                with connect(server.url) as connection:
                    until(lambda: connection.scard("rq:workers"))
                server.stop()
                until(lambda: "Redis is away" in log_file.read_text() or process.poll() is not None)
                assert process.poll() is None
                alive.unlink()
                until(alive.exists)  # so that nobody restarts the process
                process.terminate()
                assert process.wait(timeout=20) == 0
        finally:
            server.stop()


def test_the_process_counts_as_alive_again_after_redis_was_emptied(command: Command, sender: Sender) -> None:
    worker, connection = WebhookWorker(sender), sender.connection
    environment = {**os.environ, "LABELGRID_REDIS_URL": sender.settings.redis_url}
    worker.register_birth()
    assert command("check", environment=environment)[0] == 0
    connection.flushdb()
    code, _, err = command("check", environment=environment)
    assert (code, err) == (1, f"labelgrid: no worker of {socket.gethostname()} is alive, or it hangs\n")
    worker.run_maintenance_tasks()
    assert command("check", environment=environment)[0] == 0


def test_only_the_events_that_a_job_asked_for_are_in_the_outbox(store: JobStore) -> None:
    first, second = create_job(store, "http://x/", ("running", "failed")), create_job(store, "http://x/")
    for job_id in (first, second):
        store.begin(job_id)
    assert outbox(store) == [f"{first} running"]
    store.cancel(first)
    store.fail(second, "why")
    assert set(outbox(store)) == {f"{first} running", f"{second} failed"}
    assert store.webhooks.count == 2


def test_an_attempt_that_ends_between_two_reads_of_another_sends_nothing_twice(
    start: Callable[..., Receiver], store: JobStore, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = start(200)
    job_id = create_job(store, receiver.url)
    store.fail(job_id, "why")
    other, read = Sender(sender.connection, sender.settings), sender.store.record

    def slow(job_id: str) -> object:
        other.attempt(job_id, "failed")
        return read(job_id)

    monkeypatch.setattr(sender.store, "record", slow)
    sender.attempt(job_id, "failed")
    assert len(receiver.got()) == 1
    assert not outbox(store)


@pytest.mark.parametrize(
    ("statuses", "attempts"), [((200,), 1), ((503, 500, 200), 3), ((500,), 3), ((410,), 1), ((307, 200), 2)]
)
def test_a_refused_message_is_retried_a_few_times(
    start: Callable[..., Receiver], store: JobStore, sender: Sender, monkeypatch: pytest.MonkeyPatch,
    statuses: tuple[int, ...], attempts: int,
) -> None:  # fmt: skip
    now = time.time()
    monkeypatch.setattr("service.webhooks.worker.time", SimpleNamespace(time=lambda: now))
    receiver = start(*statuses)
    store.cancel(job_id := create_job(store, receiver.url))
    waits_s = []
    for _ in range(5):
        sender.attempt(job_id, "cancelled")
        for member in outbox(store):
            waits_s.append(store.connection.zscore(keys.WEBHOOKS, member) - now)
            store.connection.zadd(keys.WEBHOOKS, {member: now})
    assert len(receiver.got()) == attempts
    assert outbox(store) == []
    assert {message["path"] for message in receiver.got()} == {"/hook?x=1"}  # no redirect is followed
    for i, wait_s in enumerate(waits_s):
        assert 0.05 * 4**i <= round(wait_s, 4) <= 1.25 * 0.05 * 4**i


def test_a_receiver_that_does_not_answer_is_abandoned_and_retried(
    start: Callable[..., Receiver], store: JobStore, hooked: Settings
) -> None:
    receiver, hasty = start(0), hooked.model_copy(update={"webhook_timeout_s": 1.0})
    store.cancel(job_id := create_job(store, receiver.url))
    Sender(store.connection, hasty).attempt(job_id, "cancelled")
    until(receiver.got)
    assert outbox(store) == [f"{job_id} cancelled"]


def test_the_timeout_of_the_settings_counts(start: Callable[..., Receiver], hooked: Settings, store: JobStore) -> None:
    receiver = start(-1)  # answers after 1 s
    for timeout_s, is_sent in ((30.0, True), (0.2, False)):
        store.cancel(job_id := create_job(store, receiver.url))
        own = hooked.model_copy(update={"webhook_timeout_s": timeout_s})
        Sender(store.connection, own).attempt(job_id, "cancelled")
        assert outbox(store) == ([] if is_sent else [f"{job_id} cancelled"])


def test_a_name_that_takes_long_to_resolve_is_abandoned(
    store: JobStore, hooked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = hooked.model_copy(update={"webhook_timeout_s": 1.0})
    resolved = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolved.wait(60))
    store.cancel(job_id := create_job(store, "http://hook.example/"))
    Sender(store.connection, hasty).attempt(job_id, "cancelled")  # ends although the look-up does not
    assert outbox(store) == [f"{job_id} cancelled"]
    assert not resolved.is_set()
    resolved.set()


def test_a_receiver_that_never_answers_does_not_delay_others(
    start: Callable[..., Receiver], hooked: Settings, store: JobStore, tmp_path: Path
) -> None:
    (tmp_path / "slow").mkdir()
    quick, slow = start(200), Receiver(tmp_path / "slow", 0)
    try:
        names = ("redis_url", "webhook_allow_private")
        environment = {**os.environ, **{f"LABELGRID_{name.upper()}": str(getattr(hooked, name)) for name in names}}
        environment |= {"LABELGRID_WEBHOOK_SECRET": SECRET, "LABELGRID_WEBHOOK_TIMEOUT_S": "50"}
        hung = [create_job(store, slow.url, owner="alice") for _ in range(3 * RECEIVER_SLOTS)]
        others = [create_job(store, quick.url, owner=owner) for owner in ("alice", "bob")]
        with webhook_process(environment):
            for job_id in hung:
                store.cancel(job_id)
            until(lambda: len(slow.got()) == RECEIVER_SLOTS)
            for job_id in others:
                store.cancel(job_id)
            until(lambda: len(quick.got()) == 2)
            assert len(slow.got()) == RECEIVER_SLOTS  # all of them still in their first attempt
    finally:
        slow.stop()


@pytest.fixture
def worker(sender: Sender) -> Iterator[WebhookWorker]:
    made = WebhookWorker(sender)
    yield made
    made.turns.stop()


def test_an_attempt_that_rq_lost_is_made_once_it_is_due(
    start: Callable[..., Receiver], store: JobStore, worker: WebhookWorker
) -> None:
    receiver = start(200)
    store.cancel(job_id := create_job(store, receiver.url))
    worker.take_due()
    assert f"{job_id} cancelled" not in worker.turns  # RQ announces it
    store.connection.zadd(keys.WEBHOOKS, {f"{job_id} cancelled": time.time() - 1})
    worker.take_due()
    until(lambda: outbox(store) == [])
    assert len(receiver.got()) == 1


def test_an_attempt_that_another_process_has_just_made_is_not_repeated(
    start: Callable[..., Receiver], store: JobStore, sender: Sender
) -> None:
    receiver = start(500)
    store.cancel(job_id := create_job(store, receiver.url))
    sender.attempt(job_id, "cancelled")
    store.connection.zadd(keys.WEBHOOKS, {f"{job_id} cancelled": time.time() + 60})
    sender.attempt(job_id, "cancelled")
    assert len(receiver.got()) == 1
    store.connection.zadd(keys.WEBHOOKS, {f"{job_id} cancelled": time.time()})
    sender.attempt(job_id, "cancelled")
    assert len(receiver.got()) == 2


def test_a_message_that_another_process_delivered_meanwhile_is_not_put_off(
    store: JobStore, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.cancel(job_id := create_job(store, "http://x/"))

    async def refused(*_: object) -> None:
        store.connection.delete(keys.WEBHOOKS)
        raise Refused(500)

    monkeypatch.setattr(sender, "_send", refused)
    sender.attempt(job_id, "cancelled")
    assert outbox(store) == []


def test_a_message_of_a_job_that_is_gone_is_dropped(store: JobStore, worker: WebhookWorker) -> None:
    store.connection.zadd(keys.WEBHOOKS, {"gone finished": time.time() - 1})
    worker.take_due()
    until(lambda: outbox(store) == [])


def test_a_record_of_a_later_version_stays_in_the_outbox(store: JobStore, worker: WebhookWorker) -> None:
    store.cancel(job_id := create_job(store, "http://x/"))
    store.connection.hset(keys.job(job_id), "record", "{}")
    worker.take(f"{job_id} cancelled")
    assert f"{job_id} cancelled" not in worker.turns
    assert outbox(store) == [f"{job_id} cancelled"]


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
    assert store.connection.zcard("labelgrid:deadlines") == 0
