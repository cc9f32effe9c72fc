"""What the HTTP server accepts, as far as clients notice, and how it shuts down."""

import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from redis import Redis

from service.api.access.api_keys import hash_of, new_key
from service.settings import Settings
from service.store import keys, workers
from service.store.async_jobs import AsyncJobs
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.conftest import api_server, client_of, serving
from tests.service.api.test_events import events, read
from tests.service.processes import until
from tests.service.worker.conftest import run

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "headers": (HEAD, b"a:b\r\n"),
    "an address": (b"GET /", b"x"),
    "trailers": (CHUNKED + b"1\r\n{\r\n0\r\n", b"a:b\r\n"),
}


@pytest.mark.parametrize(("begin", "more"), ENDLESS.values(), ids=ENDLESS)
def test_a_client_whose_headers_do_not_end_loses_its_connection(
    client: httpx.Client, begin: bytes, more: bytes
) -> None:
    part, sent = more * (1 << 14), 0
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as endless:
        endless.sendall(GET + begin)
        with contextlib.suppress(ConnectionError):  # reset, with or without an answer
            while sent < 10 << 20:
                endless.sendall(part)
                sent += len(part)
    assert sent < 10 << 20


def test_long_headers_and_long_bodies_are_no_headers_without_end(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as long:
        for part in (
            GET[:-2] + b"x-long: " + b"x" * 30_000,
            b"x" * 30_000 + b"\r\n\r\n",
        ):  # as a slow network brings them
            long.sendall(part)
            time.sleep(0.1)
        assert long.recv(4096).startswith(b"HTTP/1.1 200")

    def body() -> Iterator[bytes]:
        yield from [b'{"labels": [', *[b" " * 1000] * 500, b"]}"]

    answer = client.post("/generate", content=body(), headers={"content-type": "application/json"})
    assert answer.json()["detail"].startswith("expected at least one label list")


def test_what_follows_a_body_is_no_header(settings: Settings, alive: JobStore) -> None:
    key = new_key()
    with (
        api_server(settings.model_copy(update={"api_keys": f"alice:{hash_of(key)}"})) as server,
        socket.create_connection(server.servers[0].sockets[0].getsockname(), timeout=60) as client,
    ):
        client.sendall(CHUNKED + f"0\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 401")


JSON = b"Content-Type: application/json\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
BODY = b'{"labels": []}'
WITH_LENGTH, IN_CHUNKS = b"Content-Length: 14\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
UPGRADES = {
    "in parts": [HEAD + JSON + UPGRADE, WITH_LENGTH, BODY[:5], BODY[5:]],
    "in chunks": [HEAD + JSON + UPGRADE + IN_CHUNKS, b"e\r\n" + BODY + b"\r\n", b"0\r\n\r\n"],
}


@pytest.mark.parametrize("parts", UPGRADES.values(), ids=UPGRADES)
def test_a_request_for_another_protocol_is_answered_without_it(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, parts: list[bytes]
) -> None:
    """Java's clients ask for HTTP/2 with every request."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as java:
        for part in [*parts, GET.replace(b"\r\n\r\n", b"\r\n" + UPGRADE + b"Connection: close\r\n\r\n")]:
            java.sendall(part)
        answer = b"".join(iter(lambda: java.recv(1 << 16), b""))
    assert b"expected at least one label list" in answer
    assert answer.count(b'{"status":"ok"}') == 1
    assert not caplog.records


TWO = {"labels": [["red cube"], ["blue sphere"]], "steps": 2}


@pytest.fixture
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let waiting requests notice a shutdown at once."""
    monkeypatch.setattr("service.store.async_jobs.LOOK_AGAIN_S", 0.05)
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
        waiting = thread.submit(client.post, "/generate", json=TWO)
        (job_id,) = until(lambda: connection.zrange(keys.DEADLINES, 0, -1))
        with client.stream("GET", f"/jobs/{job_id}/events") as response:
            stream = events(response)
            assert next(stream)["event"] == "job"
            server.should_exit = True
            assert list(stream) == []  # the stream has ended, the job has not
        until(lambda: is_refused(client))  # an orchestrator or proxy then asks another process
        assert connection.zrange(keys.DEADLINES, 0, -1) == [job_id]
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
        waiting = threads.submit(client.post, "/generate", json=TWO)
        waiting_at_v1 = threads.submit(client.post, "/v1/images/generations", json=openai)
        until(lambda: connection.zcard(keys.DEADLINES) == 2)
        server.should_exit = True
        answer = waiting.result(timeout=60)
        assert (answer.status_code, answer.json()["status"]) == (202, "queued")
        assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
        late = waiting_at_v1.result(timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "not_in_time")
    assert connection.zcard(keys.DEADLINES) == 2


def test_a_draining_worker_counts_as_none(client: httpx.Client, alive: JobStore) -> None:
    assert client.get("/readyz").status_code == 200
    workers.announce(alive.connection, "w", {"draining": True}, lease_s=60)
    for answer in (client.get("/readyz"), client.post("/generate", json=TWO)):
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:labelgrid:problem:no-worker"


def test_an_answer_after_which_the_connection_closes_says_so(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise KeyError("nobody foresaw this")

    monkeypatch.setattr(AsyncJobs, "page", fail)
    answer = client.get("/jobs")
    assert (answer.status_code, answer.headers["connection"]) == (500, "close")
    assert client.get("/healthz").status_code == 200
