"""Clients that send too slowly, or headers without end, lose their connection; those that wait for an answer do not."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from redis import Redis

from service.api import connections
from service.api.access.keys import hash_of, new_key
from service.api.downloads.reader import ResultReader
from service.settings import Settings
from service.store.jobs import JobStore
from tests.conftest import api_server, client_of

CLOSE = b"Connection: close\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def port(settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "HEADER_S", 0.5)
    monkeypatch.setattr(connections, "BODY_S", 0.5)
    with api_server(settings) as server:
        yield server.servers[0].sockets[0].getsockname()[1]


SLOW = {
    "nothing": b"",
    "half a header": b"GET /healthz HTTP/1.1\r\nHost: loc",
    "half a body": b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
}


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
@pytest.mark.parametrize("earlier", [b"", GET], ids=["new", "kept"])
def test_a_client_that_stops_in_the_middle_loses_its_connection(port: int, earlier: bytes, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(earlier + sent)
        answer = b""
        while part := client.recv(4096):
            answer += part
        assert answer.count(b"HTTP/1.1 200") == (earlier == GET)


def test_a_request_may_wait_longer_for_its_response(
    settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 0.2)
    monkeypatch.setattr(connections, "BODY_S", 0.2)
    with api_server(settings) as server, client_of(server) as client:
        for _ in range(2):
            answer = client.post("/generate", json={"labels": [["red cube"]]}, headers={"prefer": "wait=1"})
            assert answer.status_code == 202


HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "headers": (HEAD, b"a:b\r\n"),
    "a header": (HEAD + b"X: ", b"x"),
    "an address": (b"GET /", b"x"),
    "trailers": (CHUNKED + b"1\r\n{\r\n0\r\n", b"a:b\r\n"),
    "a trailer": (CHUNKED + b"1\r\n{\r\n0\r\nX: ", b"x"),
    "an extension of a chunk": (CHUNKED + b"1;x=", b"x"),
}


@pytest.mark.parametrize(("begin", "more"), ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("earlier", [b"", GET], ids=["new", "kept"])
def test_a_client_whose_headers_do_not_end_loses_its_connection(
    client: httpx.Client, earlier: bytes, begin: bytes, more: bytes
) -> None:
    part = more * (connections.MAX_HEADER_BYTES // 4 // len(more))
    sent = 0
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as endless:
        endless.sendall(earlier + begin)
        with contextlib.suppress(ConnectionError):  # reset, with or without an answer
            while sent < 10 * 1024 * 1024:
                endless.sendall(part)
                sent += len(part)
    assert sent < 10 * 1024 * 1024


def test_long_headers_and_long_bodies_are_no_headers_without_end(client: httpx.Client) -> None:
    headers = {"x-long": "x" * (connections.MAX_HEADER_BYTES - 1000)}
    assert client.get("/healthz", headers=headers).status_code == 200

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
    "in one part": [HEAD + JSON + UPGRADE + WITH_LENGTH + BODY],
    "in parts": [HEAD + JSON + UPGRADE, WITH_LENGTH, BODY[:5], BODY[5:]],
    "in chunks": [HEAD + JSON + UPGRADE + IN_CHUNKS, b"e\r\n" + BODY + b"\r\n", b"0\r\n\r\n"],
}


@pytest.mark.parametrize("parts", UPGRADES.values(), ids=UPGRADES)
def test_a_request_for_another_protocol_is_answered_without_it(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, parts: list[bytes]
) -> None:
    """Java's clients ask for HTTP/2 with every request."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as java:
        for part in [*parts, GET.replace(b"\r\n\r\n", b"\r\n" + UPGRADE + b"\r\n") * 1100, GET[:-2] + UPGRADE + CLOSE]:
            java.sendall(part)
        answer = b"".join(iter(lambda: java.recv(1 << 16), b""))
    assert b"expected at least one label list" in answer
    assert answer.count(b'{"status":"ok"}') == 1101
    assert not caplog.records


@pytest.mark.parametrize("more", [b"", UPGRADE])
@pytest.mark.parametrize("target", [b"/healthz", b"localhost:80", b"[::1]:80"])
def test_the_api_is_no_proxy(client: httpx.Client, target: bytes, more: bytes) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as proxied:
        proxied.sendall(b"CONNECT " + target + b" HTTP/1.1\r\nHost: localhost\r\n" + more + b"\r\n")
        assert proxied.recv(4096).startswith(b"HTTP/1.1 400 ")


class Recorder:
    """A transport that notes what is written to it."""

    def __init__(self) -> None:
        self.written, self.closed, self.name = list[bytes](), False, "recorder"

    def write(self, data: bytes) -> None:
        if self.closed:
            raise RuntimeError("the handler is closed")  # as uvloop's transports say
        self.written.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


HEADERS = b"HTTP/1.1 200 OK\r\n\r\n"
WRITES = {
    "a body": ([HEADERS, b"body"], [HEADERS + b"body"]),
    "an empty body": ([HEADERS, b""], [HEADERS]),
    "a late body": ([HEADERS, None, b"body"], [HEADERS, b"body"]),
    "chunks": (
        [HEADERS, b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n"],
        [HEADERS + b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n"],
    ),
    "a body like headers": ([HEADERS, b"\r\n\r\n", None], [HEADERS + b"\r\n\r\n"]),
    "two responses": ([HEADERS, b"a", HEADERS, b"b"], [HEADERS + b"a", HEADERS + b"b"]),
}


@pytest.mark.parametrize("ends", ["the loop goes on", "it is closed"])
@pytest.mark.parametrize(("writes", "packets"), WRITES.values(), ids=WRITES)
def test_headers_wait_for_the_body_if_it_comes_at_once(
    writes: list[bytes | None], packets: list[bytes], ends: str
) -> None:
    transport = Recorder()

    async def write() -> None:
        joined = connections.JoinedWrites(transport, asyncio.get_running_loop())
        for data in writes:
            if data is None:
                await asyncio.sleep(0)
            else:
                joined.write(data)
        if ends == "it is closed":
            joined.close()
        else:
            await asyncio.sleep(0)
        assert joined.name == transport.name

    asyncio.run(write())
    assert transport.written == packets
    assert transport.closed == (ends == "it is closed")


@pytest.mark.parametrize("written", [[HEADERS], [HEADERS, b"body"]], ids=["headers", "headers and body"])
def test_a_client_that_goes_away_meanwhile_is_no_error(written: list[bytes]) -> None:
    transport, errors = Recorder(), list[dict[str, object]]()

    async def write() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: errors.append(context))
        joined = connections.JoinedWrites(transport, loop)
        for data in written:
            joined.write(data)
        transport.close()  # as the loop does
        await asyncio.sleep(0)
        joined.close()  # as uvicorn does after an error in the middle of a response

    asyncio.run(write())
    assert errors == []


LARGE = bytes(24 << 20)  # more than the system's buffers take
GET_LARGE = b"GET /jobs/x/images/0.png HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def asking_for_large(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, *headers: bytes
) -> Iterator[list[socket.socket]]:
    """Give connections that have asked for a large picture, each with one of these headers, and have read nothing."""

    async def check_owner(*arguments: object) -> None:
        """It is the client's own."""

    async def image(*arguments: object) -> bytes:
        return LARGE

    def pause(protocol: connections.PunctualProtocol) -> None:
        pauses.append(protocol)
        pause_writing(protocol)

    pauses, pause_writing = list[object](), connections.PunctualProtocol.pause_writing
    monkeypatch.setattr(connections.PunctualProtocol, "pause_writing", pause)
    monkeypatch.setattr(ResultReader, "check_owner", check_owner)
    monkeypatch.setattr(ResultReader, "image", image)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(api_server(settings))
        clients = list[socket.socket]()
        for header in headers:
            client = socket.create_connection(server.servers[0].sockets[0].getsockname(), timeout=60)
            clients.append(stack.enter_context(client))
            client.sendall(GET_LARGE + header + CLOSE)
            while len(pauses) < len(clients):
                time.sleep(0.01)
        yield clients


def read_all(client: socket.socket) -> int:
    """Return how many bytes arrive until the connection is closed or reset."""
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 20):
            received += len(part)
    return received


def test_an_answer_that_nobody_reads_is_dropped(
    settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "READ_S", 0.2)
    with asking_for_large(settings, monkeypatch, b"") as (client,):
        while connections.PunctualProtocol.unread:
            time.sleep(0.01)
        assert read_all(client) < len(LARGE)


def test_a_slow_client_gets_all(settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    with asking_for_large(settings, monkeypatch, b"") as (client,):
        assert read_all(client) > len(LARGE)
        assert not connections.PunctualProtocol.unread


def test_the_unread_answers_of_one_owner_have_a_limit(
    settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_UNREAD", 2 * len(LARGE))
    keys = [new_key(), new_key()]
    listed = ",".join(f"owner{i}:{hash_of(key)}" for i, key in enumerate(keys))
    alice, bob = (f"Authorization: Bearer {key}\r\n".encode() for key in keys)
    keyed = settings.model_copy(update={"api_keys": listed})
    with asking_for_large(keyed, monkeypatch, bob, alice, alice, alice) as clients:
        whole = [read_all(client) > len(LARGE) for client in clients]
    assert whole == [True, False, True, True]


def test_a_short_response_is_one_packet(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(GET)
        answer = client.recv(1 << 16)
    assert answer.endswith(b'{"status":"ok"}')
