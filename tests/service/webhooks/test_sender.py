"""Sending: each event that a job asked for arrives, signed, if need be after retries; the API stops cleanly."""

import asyncio
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError
from standardwebhooks import WebhookVerificationError

from service.local.redis_server import RedisServer
from service.settings import Settings
from service.store import keys, workers
from service.store.async_jobs import AsyncJobs
from service.store.claims import Claim, PictureStream
from service.store.connection import connect
from service.store.jobs import JobStore
from service.webhooks.sender import RECEIVER_PLACES, Sender, receiver_secret, signing_key
from tests.conftest import serving
from tests.paths import ROOT
from tests.service.conftest import Command
from tests.service.processes import until
from tests.service.store.helpers import DIGEST
from tests.service.webhooks.conftest import (
    SECRET,
    Receiver,
    attempt,
    create_job,
    outbox,
    send_due,
    verified,
    with_sender,
)


def test_the_api_sends_webhooks_and_retries(start: Callable[..., Receiver], hooked: Settings, store: JobStore) -> None:
    receiver = start(500, 204)
    workers.announce(store.connection, "w", {}, lease_s=60)
    with serving(hooked) as client:
        body = {"labels": [["red cube"]], "webhook": receiver.url}
        job_id = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()["id"]
        job = client.post(f"/jobs/{job_id}/cancel").json()
        until(lambda: len(receiver.got()) == 2 and not outbox(store))
    for message in receiver.got():  # the receiver refused the first
        content = verified(message)
        assert (content["type"], content["data"]) == ("job.cancelled", job)
        assert message["path"] == "/hook?x=1"
        assert message["headers"]["webhook-id"] == f"{job_id}.cancelled"
        assert message["headers"]["host"] == f"127.0.0.1:{receiver.port}"


def test_sending_survives_an_outage_of_redis(
    start: Callable[..., Receiver], hooked: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = start(200)
    with tempfile.TemporaryDirectory(prefix="lg-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            with serving(hooked.model_copy(update={"redis_url": server.url})):
                server.stop()
                until(lambda: "webhooks wait for Redis" in caplog.text)
                server.start()
                store = JobStore(connect(server.url), hooked)
                store.cancel(create_job(store, receiver.url))
                until(receiver.got)
        finally:
            server.stop()


def test_an_attempt_that_the_end_of_the_process_interrupts_is_made_again(
    start: Callable[..., Receiver], hooked: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.webhooks.sender.END_S", 0.1)
    receiver = start(0)  # it never answers
    store.cancel(job_id := create_job(store, receiver.url))

    async def end(sender: Sender) -> None:
        async with sender.running():
            while not receiver.got():
                await asyncio.sleep(0.02)

    with_sender(hooked, end)
    assert outbox(store) == [f"{job_id} cancelled"]


def test_an_unforeseen_error_ends_no_sending(
    start: Callable[..., Receiver], hooked: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, take_due, looks = start(200), Sender.take_due, list[int]()

    async def fail_first(sender: Sender) -> None:
        looks.append(1)
        if len(looks) == 1:
            raise ValueError("unforeseen")
        await take_due(sender)

    monkeypatch.setattr(Sender, "take_due", fail_first)
    store.cancel(create_job(store, receiver.url))
    with serving(hooked):
        until(receiver.got)


def test_only_the_events_that_a_job_asked_for_are_in_the_outbox(store: JobStore) -> None:
    first, second = create_job(store, "http://x/", ("running", "failed")), create_job(store, "http://x/")
    for job_id in (first, second):
        store.begin(PictureStream(store.connection, store.settings, DIGEST, "w"), [Claim("1-1", job_id, 0)])
    assert outbox(store) == [f"{first} running"]
    store.cancel(first)
    store.fail(second, "why")
    assert set(outbox(store)) == {f"{first} running", f"{second} failed"}


@pytest.mark.parametrize(
    ("statuses", "attempts"), [((200,), 1), ((503, 500, 200), 3), ((500,), 3), ((410,), 1), ((307, 200), 2)]
)
def test_a_refused_message_is_retried_a_few_times(
    start: Callable[..., Receiver],
    store: JobStore,
    hooked: Settings,
    statuses: tuple[int, ...],
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receiver = start(*statuses)
    store.cancel(job_id := create_job(store, receiver.url))
    monkeypatch.setattr("service.webhooks.sender.BACKOFF_S", 50.0)
    waits_s = []
    for _ in range(5):
        attempt(hooked, job_id, "cancelled")
        for member in outbox(store):
            waits_s.append(store.connection.zscore(keys.WEBHOOKS, member) - time.time())
            store.connection.zadd(keys.WEBHOOKS, {member: 0})
    assert len(receiver.got()) == attempts
    assert outbox(store) == []
    assert {message["path"] for message in receiver.got()} == {"/hook?x=1"}  # no redirect is followed
    for i, wait_s in enumerate(waits_s):
        assert 50 * 4**i - 5 < wait_s <= 1.25 * 50 * 4**i


def test_a_name_that_takes_long_to_resolve_is_abandoned(
    store: JobStore, hooked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = hooked.model_copy(update={"webhook_timeout_s": 1.0})
    resolved = threading.Event()
    look_up = socket.getaddrinfo

    def hang(host: str, *arguments: Any, **options: Any) -> Any:
        return resolved.wait(60) if host == "hook.example" else look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    store.cancel(job_id := create_job(store, "http://hook.example/"))

    async def give_up(sender: Sender) -> None:
        await sender.attempt(job_id, "cancelled")  # ends although the look-up does not
        resolved.set()

    begun = time.monotonic()
    with_sender(hasty, give_up)
    assert time.monotonic() - begun < 30
    assert outbox(store) == [f"{job_id} cancelled"]


def test_a_receiver_that_never_answers_does_not_delay_others(
    start: Callable[..., Receiver], hooked: Settings, store: JobStore, tmp_path: Path
) -> None:
    (tmp_path / "slow").mkdir()
    quick, slow = start(200), Receiver(tmp_path / "slow", 0)
    try:
        hung = [create_job(store, slow.url, owner="alice") for _ in range(3 * RECEIVER_PLACES)]
        others = [create_job(store, quick.url, owner=owner) for owner in ("alice", "bob")]
        with serving(hooked):
            for job_id in hung:
                store.cancel(job_id)
            until(lambda: len(slow.got()) == RECEIVER_PLACES)
            for job_id in others:
                store.cancel(job_id)
            until(lambda: len(quick.got()) == 2)
            assert len(slow.got()) == RECEIVER_PLACES  # all of them still in their first attempt
    finally:
        slow.stop()


def test_messages_that_one_receiver_leaves_waiting_take_little_memory(
    start: Callable[..., Receiver], store: JobStore, hooked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.webhooks.sender.MOST_HELD", 2)
    now = store.connection.time()[0]
    monkeypatch.setattr(time, "time", lambda: 0.0)  # of a sender whose clock is wrong
    receiver = start(200)
    for _ in range(3):
        store.cancel(create_job(store, receiver.url))
    send_due(hooked)
    assert len(receiver.got()) == 2
    ((_, due_at),) = store.connection.zrange(keys.WEBHOOKS, 0, -1, withscores=True)
    assert 60 <= due_at - now < 90


def test_a_message_of_a_job_that_is_gone_is_dropped(store: JobStore, hooked: Settings) -> None:
    store.connection.zadd(keys.WEBHOOKS, {"gone finished": time.time() - 1})
    send_due(hooked)
    assert outbox(store) == []


def test_a_redis_that_is_away_while_the_job_is_read_takes_no_attempt(
    store: JobStore, hooked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.cancel(job_id := create_job(store, "http://x/"))

    async def away(*_: object) -> None:
        raise ConnectionError("Redis is away")

    monkeypatch.setattr(AsyncJobs, "job", away)
    with pytest.raises(ConnectionError):
        attempt(hooked, job_id, "cancelled")
    assert outbox(store) == [f"{job_id} cancelled"]
    assert store.connection.hgetall("labelgrid:webhook-attempts") == {}


def test_a_record_of_a_later_version_stays_in_the_outbox(store: JobStore, hooked: Settings) -> None:
    store.cancel(job_id := create_job(store, "http://x/"))
    store.connection.hset(keys.job(job_id), "record", "{}")
    send_due(hooked)
    assert outbox(store) == [f"{job_id} cancelled"]


def test_a_request_with_an_impossible_webhook_is_refused(settings: Settings, hooked: Settings, store: JobStore) -> None:
    workers.announce(store.connection, "w", {}, store.settings.lease_s)
    cases = [
        (settings, {"webhook": "http://example.com/"}, "this service has no webhooks"),
        (settings, {"webhook_events": ["finished"]}, "has no effect without webhook"),
        (hooked, {"webhook": "file:///etc/passwd"}, "not an http:// or https:// URL"),
        (hooked, {"webhook": "http://example.com/", "webhook_events": []}, "at least 1"),
    ]
    for chosen, fields, words in cases:
        with serving(chosen) as client:
            answer = client.post("/generate", json={"labels": [["red cube"]], **fields})
        assert (answer.status_code, words in answer.json()["detail"]) == (422, True), answer.text
    assert store.connection.zcard("labelgrid:deadlines") == 0


def test_only_the_owners_secret_verifies_a_message(
    start: Callable[..., Receiver], store: JobStore, hooked: Settings
) -> None:
    receiver = start(200)
    store.cancel(job_id := create_job(store, receiver.url, owner="alice"))
    for _ in range(2):  # the second time it is not due any more
        attempt(hooked, job_id, "cancelled")
    (message,) = receiver.got()
    assert verified(message, "alice")["data"]["id"] == job_id
    with pytest.raises(WebhookVerificationError):
        verified(message, "bob")


def test_the_command_prints_the_receivers_secret(command: Command) -> None:
    environment = {**os.environ, "LABELGRID_WEBHOOK_SECRET": SECRET}
    code, out, _ = command("webhook-secret", "alice", environment=environment)
    assert (code, out.strip()) == (0, receiver_secret(signing_key(SECRET, "alice")))
    code, _, err = command("webhook-secret", "alice", environment=os.environ)
    assert (code, err) == (1, "labelgrid: LABELGRID_WEBHOOK_SECRET is not set\n")


def test_the_snippet_in_the_documentation_verifies_messages(
    start: Callable[..., Receiver], store: JobStore, hooked: Settings
) -> None:
    receiver = start(200)
    store.cancel(job_id := create_job(store, receiver.url))
    attempt(hooked, job_id, "cancelled")
    (message,) = receiver.got()
    page = (ROOT / "docs/api.md").read_text().partition("\n## Webhooks\n")[2]
    snippet = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(snippet, names)
    secret, body = receiver_secret(signing_key(SECRET, "")), message["body"].encode()
    names["verify"](secret, message["headers"], body)
    other, old = receiver_secret(signing_key("x", "")), {**message["headers"], "webhook-timestamp": "1700000000"}
    for arguments in (
        (other, message["headers"], body),
        (secret, message["headers"], body + b" "),
        (secret, old, body),
    ):
        with pytest.raises(ValueError, match=r"not from the service|too old"):
            names["verify"](*arguments)
