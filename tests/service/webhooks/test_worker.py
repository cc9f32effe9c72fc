"""Webhooks: a real receiver gets signed messages, again where it did not take them; nothing goes to private ones."""

import asyncio
import ipaddress
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from redis import Redis
from rq.job import Job as RqJob
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from standardwebhooks import Webhook, WebhookVerificationError

from service.contract.records import JobRecord, WebhookEvent
from service.local.redis_server import RedisServer
from service.settings import Settings
from service.store import workers
from service.store.connection import connect
from service.store.jobs import JobStore, new_id
from service.store.keys import WEBHOOKS
from service.webhooks.addresses import AddressNotAllowed, check_url, is_public
from service.webhooks.signing import receiver_secret, signing_key
from service.webhooks.worker import Sender
from shared.options import SamplingOptions
from tests.conftest import serving
from tests.paths import ROOT

SECRET = "a secret that is long enough"
ENDS: tuple[WebhookEvent, ...] = ("finished", "failed", "cancelled")


class Receiver:
    """The process of tests/receiver.py."""

    def __init__(self, folder: Path, *statuses: int, certificate: Path | None = None) -> None:
        port_file, self.log = folder / "port", folder / "log"
        command = [sys.executable, "-m", "tests.receiver", str(port_file), str(self.log), *map(str, statuses)]
        environment = {**os.environ, **({"RECEIVER_CERTIFICATE": str(certificate)} if certificate else {})}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)
        until(port_file.exists)
        self.port = int(port_file.read_text())
        self.url = f"http://127.0.0.1:{self.port}/hook?x=1"

    def got(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Receiver]]:
    started = list[Receiver]()

    def start(*statuses: int, certificate: Path | None = None) -> Receiver:
        started.append(Receiver(tmp_path, *statuses, certificate=certificate))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def hooked(settings: Settings) -> Settings:
    update = {"webhook_secret": SecretStr(SECRET), "webhook_allow_private": True, "webhook_backoff_s": 0.05}
    return settings.model_copy(update={**update, "webhook_attempts": 3, "webhook_timeout_s": 1.0})


@pytest.fixture
def store(connection: Redis, hooked: Settings) -> JobStore:
    return JobStore(connection, hooked)


@pytest.fixture
def sender(connection: Redis, hooked: Settings) -> Sender:
    return Sender(connection, hooked)


def created(store: JobStore, url: str, events: tuple[WebhookEvent, ...] = ENDS, owner: str = "") -> str:
    record = JobRecord(
        id=new_id(),
        owner=owner,
        kind="generate",
        created_at=time.time(),
        model="toy",
        digest="d" * 64,
        labels=[["red cube"]],
        seed=7,
        columns=8,
        options=SamplingOptions(),
        webhook=url,
        webhook_events=events,
    )
    store.create(record)
    return record.id


def due(store: JobStore) -> list[str]:
    return [raw.decode() for raw in store.connection.zrange(WEBHOOKS, 0, -1)]


def verified(message: dict[str, Any], owner: str = "") -> dict[str, Any]:
    """What another implementation of Standard Webhooks makes of a message."""
    secret = receiver_secret(signing_key(SECRET, owner))
    content: dict[str, Any] = Webhook(secret).verify(message["body"], message["headers"])
    return content


def test_a_job_of_the_api_is_told_of_by_the_worker_process(
    start: Callable[..., Receiver], hooked: Settings, store: JobStore
) -> None:
    receiver = start(500, 204)
    names = ("redis_url", "webhook_allow_private", "webhook_backoff_s")
    environment = {**os.environ, **{f"LABELGRID_{name.upper()}": str(getattr(hooked, name)) for name in names}}
    environment["LABELGRID_WEBHOOK_SECRET"] = SECRET
    worker = subprocess.Popen([sys.executable, "-m", "service", "webhooks"], cwd=ROOT, env=environment)
    workers.announce(store.connection, "w", {"host": "another"}, lease_s=60)
    try:
        with serving(hooked) as client:
            body = {"labels": [["red cube"]], "webhook": receiver.url}
            job_id = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()["id"]
            job = client.delete(f"/jobs/{job_id}").json()
            until(lambda: len(receiver.got()) == 2 and not due(store))
        for message in receiver.got():  # the first was not taken
            content = verified(message)
            assert (content["type"], content["data"]) == ("job.cancelled", job)
            assert message["path"] == "/hook?x=1"
            assert message["headers"]["webhook-id"] == f"{job_id}.cancelled"
            assert message["headers"]["host"] == f"127.0.0.1:{receiver.port}"
        check = [sys.executable, "-m", "service", "check"]
        assert subprocess.run(check, cwd=ROOT, env=environment).returncode == 0
        worker.terminate()
        assert worker.wait(timeout=30) == 0
        assert subprocess.run(check, cwd=ROOT, env=environment).returncode == 1
    finally:
        worker.kill()
        worker.wait()


def test_a_worker_that_is_stopped_waits_for_no_redis() -> None:
    with tempfile.TemporaryDirectory(prefix="lg-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        environment = {**os.environ, "LABELGRID_REDIS_URL": server.url, "LABELGRID_WEBHOOK_SECRET": SECRET}
        worker = subprocess.Popen([sys.executable, "-m", "service", "webhooks"], cwd=ROOT, env=environment)
        try:
            with connect(server.url) as connection:
                until(lambda: connection.scard("rq:workers"))
            server.stop()
            worker.terminate()
            worker.wait(timeout=20)
        finally:
            worker.kill()
            worker.wait()
            server.stop()


def test_only_the_events_asked_for_are_told(store: JobStore) -> None:
    first, second = created(store, "http://x/", ("running", "failed")), created(store, "http://x/")
    for job_id in (first, second):
        store.begin(job_id)
    assert due(store) == [f"{first} running"]
    store.cancel(first)
    store.fail(second, "why")
    assert set(due(store)) == {f"{first} running", f"{second} failed"}
    assert store.webhooks.count == 2


def test_a_message_is_for_its_owner_alone(start: Callable[..., Receiver], store: JobStore, sender: Sender) -> None:
    receiver = start(200)
    store.cancel(job_id := created(store, receiver.url, owner="alice"))
    sender.attempt(job_id, "cancelled")
    sender.attempt(job_id, "cancelled")  # RQ may call twice
    (message,) = receiver.got()
    assert verified(message, "alice")["data"]["id"] == job_id
    for changed in (message | {"body": message["body"] + " "}, message | {"headers": message["headers"]}):
        with pytest.raises(WebhookVerificationError):
            verified(changed, "bob" if changed["body"] == message["body"] else "alice")
    old = {**message["headers"], "webhook-timestamp": str(int(time.time()) - 3600)}
    with pytest.raises(WebhookVerificationError):
        verified({"headers": old, "body": message["body"]}, "alice")


@pytest.mark.parametrize(
    ("statuses", "attempts"), [((200,), 1), ((503, 500, 200), 3), ((500,), 3), ((410,), 1), ((307, 200), 2)]
)
def test_what_is_not_taken_is_sent_again_a_few_times(
    start: Callable[..., Receiver], store: JobStore, sender: Sender, statuses: tuple[int, ...], attempts: int
) -> None:
    receiver = start(*statuses)
    store.cancel(job_id := created(store, receiver.url))
    scores = []
    for _ in range(5):
        before = time.time()
        sender.attempt(job_id, "cancelled")
        if due(store):
            scores.append(store.connection.zscore(WEBHOOKS, due(store)[0]) - before)
    assert len(receiver.got()) == attempts
    assert due(store) == []
    assert {message["path"] for message in receiver.got()} == {"/hook?x=1"}  # no redirect is followed
    for i, wait_s in enumerate(scores):
        assert 0.05 * 4**i <= wait_s < 1.25 * 0.05 * 4**i + 1  # and what the attempt itself took


def test_a_receiver_that_does_not_answer_is_not_waited_for(
    start: Callable[..., Receiver], store: JobStore, sender: Sender
) -> None:
    receiver = start(0)
    store.cancel(job_id := created(store, receiver.url))
    sender.attempt(job_id, "cancelled")
    assert len(receiver.got()) == 1
    assert due(store) == [f"{job_id} cancelled"]


def test_what_rq_lost_is_queued_again_once_it_is_due(store: JobStore, sender: Sender) -> None:
    store.cancel(job_id := created(store, "http://x/"))
    rq_job = RqJob.fetch(f"{job_id}-cancelled", connection=store.connection, serializer=JSONSerializer)
    assert store.webhooks.count == 1
    rq_job.delete()
    store.connection.delete(store.webhooks.key)
    sender.queue_due()
    assert store.webhooks.count == 0  # who cancelled it may be about to tell RQ
    store.connection.zadd(WEBHOOKS, {f"{job_id} cancelled": time.time() - 1})
    for _ in range(3):
        sender.queue_due()
        assert store.webhooks.count == 1


def test_an_attempt_whose_worker_died_is_queued_again(store: JobStore, sender: Sender) -> None:
    store.cancel(job_id := created(store, "http://x/"))
    rq_job = RqJob.fetch(f"{job_id}-cancelled", connection=store.connection, serializer=JSONSerializer)
    store.connection.delete(store.webhooks.key)
    FailedJobRegistry(queue=store.webhooks).add(rq_job, ttl=rq_job.failure_ttl)  # what RQ makes of it
    store.connection.zadd(WEBHOOKS, {f"{job_id} cancelled": time.time() - 1})
    until(lambda: sender.queue_due() or store.webhooks.count == 1, timeout_s=5)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://2130706433:{port}/"])
def test_nothing_is_sent_to_this_machine_unless_allowed(
    start: Callable[..., Receiver], connection: Redis, hooked: Settings, store: JobStore, url: str
) -> None:
    receiver = start(200)
    strict = Sender(connection, hooked.model_copy(update={"webhook_allow_private": False}))
    for sender, received in ((strict, 0), (Sender(connection, hooked), 1)):
        store.cancel(job_id := created(store, url.format(port=receiver.port)))
        sender.attempt(job_id, "cancelled")
        assert due(store) == []
        assert len(receiver.got()) == received


def test_a_name_is_resolved_once_and_what_was_checked_is_called(
    start: Callable[..., Receiver], store: JobStore, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = start(200)
    asked = list[str]()

    async def once(self: object, host: str, port: int, **_: object) -> list[Any]:
        asked.append(host)
        assert len(asked) == 1, "a second answer could be another"
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", once)
    store.cancel(job_id := created(store, f"http://receiver.example:{receiver.port}/"))
    sender.attempt(job_id, "cancelled")
    assert asked == ["receiver.example"]
    assert [message["headers"]["host"] for message in receiver.got()] == [f"receiver.example:{receiver.port}"]


@pytest.mark.parametrize(("name", "received"), [("receiver.example", 1), ("other.example", 0)])
def test_the_certificate_is_checked_for_the_name(
    start: Callable[..., Receiver],
    store: JobStore,
    hooked: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    received: int,
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    certificate = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt"), "-days", "2"]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    certificate.write_text((tmp_path / "key").read_text() + (tmp_path / "crt").read_text())
    receiver = start(200, certificate=certificate)

    async def resolved(self: object, host: str, port: int, **_: object) -> list[Any]:
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolved)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "crt"))
    store.cancel(job_id := created(store, f"https://receiver.example:{receiver.port}/"))
    Sender(store.connection, hooked).attempt(job_id, "cancelled")
    assert len(receiver.got()) == received
    assert (due(store) == []) == bool(received)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),  # clouds hand out credentials there
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:10.1.2.3", False),
        ("::ffff:93.184.216.34", True),
        ("2002:a01:203::", False),  # 6to4 of 10.1.2.3
        ("64:ff9b::10.1.2.3", False),  # NAT64 of it
        ("64:ff9b::93.184.216.34", True),
        ("::10.1.2.3", False),
        ("::ffff:0:10.1.2.3", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "example.com/hook",
        "http:///hook",
        "http://user:word@example.com/",
        "http://user@example.com/",
        "http://example.com/#here",
        "http://example.com:99999/",
        "http://exämple.com/",
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[::1/",
        "",
        "http://0177.0.0.1/",  # these can be read, but not by what sends, or by no resolver
        "http://xn--/",
        "http://example\t.com/",
        "http://example..com/",
        f"http://{'a' * 64}.com/",
        "http://%31%32%37.0.0.1/",
    ],
)
def test_addresses_that_no_webhook_may_have(url: str) -> None:
    with pytest.raises(AddressNotAllowed):
        check_url(url, allow_private=False)


PRIVATE = ("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12")
PRIVATE += ("192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4")
IPV6_OF_IPV4 = ("[::ffff:{}]", "[::ffff:0:{}]", "[::{}]", "[64:ff9b::{}]", "[0:0:0:0:0:FFFF:{}]")


@st.composite
def spellings(draw: st.DrawFn, address: ipaddress.IPv4Address) -> str:
    """A way to write an IPv4 address as a URL's host."""
    if draw(st.booleans()):
        form = draw(st.sampled_from(IPV6_OF_IPV4))
        value = int(address)
        return form.format(draw(st.sampled_from([str(address), f"{value >> 16:x}:{value & 0xFFFF:x}"])))
    bytes_of_it = list(address.packed)
    alone = draw(st.integers(0, 3))  # parts that are a byte each; the last part is what is left
    parts = [*bytes_of_it[:alone], int.from_bytes(bytes_of_it[alone:], "big")]
    number = st.sampled_from(["{}", "0x{:x}", "0X{:X}", "0{:o}", "000{:o}"])
    return ".".join(draw(number).format(part) for part in parts) + draw(st.sampled_from(["", "."]))


before = st.sampled_from(["", "", "user@", "user:word@", "93.184.216.34@", "example.com\\@", "@"])
after = st.sampled_from(
    ["", ":80", "/", "/@example.com", "?x=@example.com", "#@example.com", "\\@example.com", "%00.example.com"]
)
private_addresses = st.sampled_from(PRIVATE).flatmap(lambda network: st.ip_addresses(v=4, network=network))


@given(private_addresses.flatmap(spellings), before, after, st.sampled_from(["http", "https", "HTTP"]))
def test_no_spelling_of_a_private_address_passes(host: str, before: str, after: str, scheme: str) -> None:
    with pytest.raises(AddressNotAllowed):
        check_url(f"{scheme}://{before}{host}{after}", allow_private=False)


@given(
    st.text()
    | st.lists(st.sampled_from([*"aA0:/@.[]%#?\\ \t\n-_", "http://", "xn--", "é", "127.1", "::"])).map("".join)
    | st.text("aX0.-_%:[]@", max_size=70).map("http://{}/hook".format)
)
def test_any_text_is_an_address_that_can_be_called_or_refused(url: str) -> None:
    try:
        check_url(url, allow_private=False)
    except AddressNotAllowed:
        return
    called = httpx.URL(url)
    assert called.host.encode("idna")
    assert called.scheme in ("http", "https")
    assert 0 <= (called.port or 0) < 1 << 16


def test_a_request_whose_webhook_cannot_be_is_refused(settings: Settings, hooked: Settings, store: JobStore) -> None:
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


def test_the_command_prints_the_receivers_secret() -> None:
    command = [sys.executable, "-m", "service", "webhook-secret", "alice"]
    environment = {**os.environ, "LABELGRID_WEBHOOK_SECRET": SECRET}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == receiver_secret(signing_key(SECRET, "alice"))
    assert SECRET not in done.stdout
    unreadable = {**environment, "LABELGRID_LEASE_S": "soon"}
    for bad, says in ((unreadable, "LABELGRID_LEASE_S=soon: "), (os.environ, "LABELGRID_WEBHOOK_SECRET is not set")):
        refused = subprocess.run(command, cwd=ROOT, env=bad, capture_output=True, text=True)
        (line,) = refused.stderr.splitlines()
        assert (refused.returncode, line.startswith(f"labelgrid: {says}")) == (1, True)


def test_the_snippet_of_the_document_verifies(start: Callable[..., Receiver], store: JobStore, sender: Sender) -> None:
    receiver = start(200)
    store.cancel(job_id := created(store, receiver.url))
    sender.attempt(job_id, "cancelled")
    (message,) = receiver.got()
    snippet = (ROOT / "docs/webhooks.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(snippet, names)
    secret, body = receiver_secret(signing_key(SECRET, "")), message["body"].encode()
    names["verify"](secret, message["headers"], body)
    bad = [(receiver_secret(signing_key("x", "")), message["headers"], body), (secret, message["headers"], body + b" ")]
    bad += [(secret, {**message["headers"], "webhook-timestamp": "1700000000"}, body)]
    for arguments in bad:
        with pytest.raises(ValueError, match=r"not from the service|too old"):
            names["verify"](*arguments)
