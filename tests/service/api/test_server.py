"""The server closes connections on which no request arrives, and may have as many as the system allows."""

import resource
import socket
import time
from collections.abc import Iterator

import pytest

from service.api import connections
from service.settings import Settings
from tests.conftest import api_server, client_of


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "], ids=["nothing", "half a head"])
def test_a_connection_without_a_whole_head_is_closed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 0.5)
    with api_server(settings) as server, socket.create_connection(server.servers[0].sockets[0].getsockname()) as slow:
        slow.settimeout(60)
        slow.sendall(sent)
        assert slow.recv(1) == b""


def test_a_request_that_takes_longer_is_answered(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the head has this limit, on a connection that sent a request before, too."""
    monkeypatch.setattr(connections, "HEADER_S", 0.5)

    def body() -> Iterator[bytes]:
        yield b'{"labels": '
        time.sleep(3.0)
        yield b"[]}"

    with api_server(settings) as server, client_of(server) as client:
        assert client.get("/healthz").status_code == 200
        answer = client.post("/generate", content=body(), headers={"content-type": "application/json"})
        assert answer.status_code == 422


def test_the_limit_of_open_files_is_the_highest_that_the_system_allows(settings: Settings) -> None:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1000, most), most))
    try:
        with api_server(settings):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
