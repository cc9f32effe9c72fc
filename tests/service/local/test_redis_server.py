"""The embedded server: where it is found, its password, and the data that it and its predecessors left."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from service.local.redis_server import RedisServer, StartFailed
from service.store import keys
from service.store.connection import connect

OF_REDIS_6 = Path(__file__).parent / "redis-6.2.aof"


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
    with running(server) as client:
        client.set("kept", "yes")
        with (
            Redis(unix_socket_path=str(server.socket), retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(RedisError, match="authenticat"),
        ):
            stranger.ping()
    with running(server) as client:  # the append-only file brings it back
        assert client.get("kept") == b"yes"


def test_jobs_that_an_embedded_redis_of_version_6_stored_are_read(redis_server: RedisServer) -> None:
    """OF_REDIS_6 is what Redis 6.2.5 wrote of two jobs."""
    server = RedisServer(redis_server.folder / "older")
    server.folder.mkdir()
    shutil.copy(OF_REDIS_6, server.folder / "appendonly.aof")
    with running(server) as client:
        assert client.hget(keys.job("first"), "status") == b"running"
        client.hset(keys.job("second"), "status", "failed")
    with running(server) as client:  # now from files of its own
        assert client.hget(keys.job("second"), "status") == b"failed"


def test_no_second_server_starts_in_a_folder(redis_server: RedisServer, connection: Redis) -> None:
    connection.set("kept", "yes")
    with pytest.raises(StartFailed, match=f"{redis_server.folder} is in use"):
        RedisServer(redis_server.folder).start()
    with Redis.from_url(redis_server.url) as client:
        assert client.get("kept") == b"yes"


def test_a_server_that_ends_without_a_word_is_reported_with_a_guess(tmp_path: Path) -> None:
    """As on a full disk, where its log stays empty."""
    (tmp_path / "redis.log").write_text("")
    with pytest.raises(StartFailed, match=f"/bin/false did not start in {tmp_path}: it wrote no log"):
        RedisServer(tmp_path, Path("/bin/false")).start()
