"""Clients that send too slowly lose their connection; those that wait for a response do not."""

import socket
from collections.abc import Iterator

import pytest
from redis import Redis

from service.api import connections
from service.settings import Settings
from service.store.jobs import JobStore
from tests.conftest import api_server, client_of

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
