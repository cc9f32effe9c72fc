"""The embedded server: its password, and the data that it and its predecessors left."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from service.local.redis_server import RedisServer
from service.settings import StartError
from service.store.connection import connect


@contextlib.contextmanager
def running(server: RedisServer) -> Iterator[Redis]:
    """Start a server, connect to it, and stop it at the end."""
    server.start()
    try:
        with connect(server.url) as client:
            yield client
    finally:
        server.stop()


def test_the_server_has_a_password_and_keeps_its_data(redis_server: RedisServer) -> None:
    server = RedisServer(redis_server.folder / "packaged")
    server.folder.mkdir()
    # of version 0.1, whose embedded Redis 6.2 had one file
    (server.folder / "appendonly.aof").write_bytes(b"*3\r\n$3\r\nSET\r\n$5\r\nolder\r\n$3\r\nyes\r\n")
    with running(server) as client:
        client.set("kept", "yes")
        with (
            Redis(unix_socket_path=str(server.socket), retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(RedisError, match="authenticat"),
        ):
            stranger.ping()
    with running(server) as client:
        assert client.mget("older", "kept") == ["yes", "yes"]


def test_no_second_server_starts_in_a_folder(redis_server: RedisServer, connection: Redis) -> None:
    connection.set("kept", "yes")
    with pytest.raises(StartError, match=f"{redis_server.folder} is in use"):
        RedisServer(redis_server.folder).start()
    assert connection.get("kept") == "yes"


def test_a_server_that_ends_without_a_word_is_reported_with_a_guess(tmp_path: Path) -> None:
    """As on a full disk, where its log stays empty."""
    (tmp_path / "redis.log").write_text("")
    with pytest.raises(StartError, match=f"/bin/false did not start in {tmp_path}: it wrote no log"):
        RedisServer(tmp_path, Path("/bin/false")).start()
