"""What the HTTP server accepts, as far as clients notice."""

import contextlib
import resource
import socket
from collections.abc import Iterator

import httpx
import pytest

from service.api.access.keys import hash_of, new_key
from service.settings import Settings
from service.store.jobs import JobStore
from tests.conftest import api_server

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "headers": (HEAD, b"a:b\r\n"),
    "a header": (HEAD + b"X: ", b"x"),
    "an address": (b"GET /", b"x"),
    "trailers": (CHUNKED + b"1\r\n{\r\n0\r\n", b"a:b\r\n"),
    "an extension of a chunk": (CHUNKED + b"1;x=", b"x"),
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
    assert client.get("/healthz", headers={"x-long": "x" * 60_000}).status_code == 200

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
        for part in [*parts, GET.replace(b"\r\n\r\n", b"\r\n" + UPGRADE + b"Connection: close\r\n\r\n")]:
            java.sendall(part)
        answer = b"".join(iter(lambda: java.recv(1 << 16), b""))
    assert b"expected at least one label list" in answer
    assert answer.count(b'{"status":"ok"}') == 1
    assert not caplog.records


def test_the_limit_of_open_files_is_the_highest_that_the_system_allows(settings: Settings) -> None:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1000, most), most))
    try:
        with api_server(settings):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
