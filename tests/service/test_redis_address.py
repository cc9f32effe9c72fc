"""Addresses of Redis behind Sentinels: what they mean, and a failover watched by real Sentinels."""

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.connection import SSLConnection
from redis.exceptions import ConnectionError

from service.local.demo import free_port
from service.local.redis_server import die_with_parent, find_binary, stop
from service.redis_address import checked
from service.store.connection import RetryUntilStopped, connect, connect_async
from tests.service.processes import until


@pytest.mark.parametrize(
    ("url", "sentinels", "options", "asking"),
    [
        (
            "redis+sentinel://me:p%40ss@one:1,two,[::1]:3/jobs/2?sentinel_password=s",
            [("one", 1), ("two", 26379), ("::1", 3)],
            {"username": "me", "password": "p@ss", "db": 2},
            {"password": "s"},
        ),
        (
            "rediss+sentinel://:secret@one/jobs?ssl_ca_certs=/ca.pem",
            [("one", 26379)],
            {"password": "secret", "ssl_ca_certs": "/ca.pem"},
            {"password": None},  # Redis's own is not for the Sentinels
        ),
    ],
)
def test_an_address_names_sentinels_and_their_primary(
    url: str, sentinels: list[tuple[str, int]], options: dict[str, Any], asking: dict[str, Any]
) -> None:
    with connect(checked(url)) as client:
        pool: Any = client.connection_pool
        asked = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"]) for one in asked] == sentinels
    assert pool.service_name == "jobs"
    assert options.items() <= pool.connection_kwargs.items()
    assert all(asking == {name: one.get(name) for name in asking} for one in asked)
    assert issubclass(pool.connection_class, SSLConnection) == url.startswith("rediss")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis+sentinel://one:26379", "its path should be the primary's name"),
        ("redis+sentinel://one/jobs/staging", "may have a database"),
        ("redis+sentinel://me:secret@one:secret/jobs", "its Sentinels cannot be read"),
        ("redis+sentinel://,two/jobs", "its Sentinels cannot be read"),
        ("redis://one/0?foo=1", "an option after its . is unknown: 'foo'"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        checked(url)
    assert "secret" not in str(error.value)


class Server:
    """A Redis server or Sentinel on a port."""

    def __init__(self, folder: Path, lines: str, *arguments: str) -> None:
        self.port = free_port()
        folder.mkdir()
        file = folder / "server.conf"
        file.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n{lines}")
        command = [str(find_binary()), str(file), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)
        self.client = Redis(port=self.port)
        until(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(ConnectionError):
            return bool(self.client.ping())
        return False

    def knows(self, others: int, replicas: int) -> bool:
        """Whether this Sentinel has found so many others, and replicas of the primary."""
        about: Any = self.client.sentinel_master("jobs")
        return (about["num-other-sentinels"], about["num-slaves"]) == (others, replicas)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Server, Server, str]]:
    """A primary, its replica, and their address by three Sentinels."""
    running = [primary := Server(tmp_path / "primary", "save ''\n")]
    try:
        running.append(replica := Server(tmp_path / "replica", f"save ''\nreplicaof 127.0.0.1 {primary.port}\n"))
        until(lambda: replica.client.info("replication").get("master_link_status") == "up")
        lines = (
            f"sentinel monitor jobs 127.0.0.1 {primary.port} 2\n"
            "sentinel down-after-milliseconds jobs 1000\n"
            "sentinel failover-timeout jobs 3000\n"  # an election that fails on a slow machine is tried again soon
        )
        sentinels = [Server(tmp_path / f"sentinel-{i}", lines, "--sentinel") for i in range(3)]
        running += sentinels
        for one in sentinels:
            until(partial(one.knows, others=2, replicas=1))
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        yield primary, replica, f"redis+sentinel://{hosts}/jobs"
    finally:
        for one in running:
            one.client.close()
            stop(one.process)


def test_clients_follow_a_failover_that_sentinels_decide(watched: tuple[Server, Server, str]) -> None:
    primary, replica, url = watched

    async def set_async(name: str) -> None:
        async with connect_async(url, timeout_s=5, max_connections=4) as client:
            await client.set(name, 1)

    with connect(url, retry=RetryUntilStopped(lambda: False)) as worker:
        worker.set("before", 1)
        asyncio.run(set_async("before, by the event loop"))
        worker.wait(1, 5000)
        primary.process.kill()
        worker.set("after", 1)  # retries until a Sentinel names another primary
        asyncio.run(set_async("after, by the event loop"))
    assert replica.client.info("replication")["role"] == "master"
    assert replica.client.dbsize() == 4
