"""Live workers: announced for a lease, withdrawn at once, forgotten once dead."""

import asyncio
from typing import Any

import pytest
from redis import Redis

from service.settings import Settings
from service.store import keys, workers
from service.store.connection import RetryUntilStopped, connect, connect_async
from service.store.functions import Pipeline
from tests.service.store.ageing import MINUTE_S, age
from tests.service.store.helpers import DIGEST, full


def hosts(live: list[dict[str, Any]]) -> list[str]:
    return [about["host"] for about in live]


def test_live_workers_are_listed_and_dead_ones_forgotten(connection: Redis) -> None:
    workers.announce(connection, "dead", {"host": "a"}, lease_s=50)
    age(connection, MINUTE_S)
    workers.announce(connection, "left", {"host": "b"}, lease_s=60)
    workers.announce(connection, "live", {"host": "c"}, lease_s=60)
    workers.withdraw(connection, "left")
    assert hosts(workers.list_live(connection)) == ["c"]
    assert connection.smembers(keys.WORKERS) == {b"dead", b"live"}
    workers.forget_dead(connection)
    assert connection.smembers(keys.WORKERS) == {b"live"}


def test_a_full_redis_does_not_keep_a_worker_from_loading_a_model(connection: Redis, settings: Settings) -> None:
    """Only its work makes room again, so it must not wait until its note about that fits."""
    worker = connect(settings.redis_url, retry=RetryUntilStopped(lambda: False))
    with full(connection):
        workers.begin_loading(worker, DIGEST, "w")
    assert not connection.exists(keys.loading(DIGEST))
    worker.close()


def test_ready_workers_are_asked_for_once_a_second_while_there_are_any(
    connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FRESH_S", 1.0)

    async def check() -> None:
        now = 0.0
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=2) as asking:
            ready = workers.ReadyWorkers(Pipeline(asking), lambda: now)
            assert await ready() == []
            workers.announce(connection, "w", {"host": "a"}, lease_s=60)
            workers.announce(connection, "ends", {"host": "b", "draining": True}, lease_s=60)
            assert hosts(await ready()) == ["a"]  # at once, although none was found a moment ago
            workers.withdraw(connection, "w")
            now = 0.5
            assert hosts(await ready()) == ["a"]
            now = 1.0
            assert await ready() == []

    asyncio.run(check())
