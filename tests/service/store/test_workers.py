"""Live workers: announced for a lease, withdrawn at once, forgotten once dead. Idle ones are woken through RQ."""

import asyncio
from typing import Any

import pytest
from redis import Redis

from service.settings import Settings
from service.store import keys, workers
from service.store.connection import RetryUntilStopped, connect, connect_async
from service.store.functions import Pipeline
from service.store.workers import Doorbell
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
    assert connection.smembers(keys.WORKERS) == {"dead", "live"}
    workers.forget_dead(connection)
    assert connection.smembers(keys.WORKERS) == {"live"}


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


TOY, OTHER = "d" * 64, "e" * 64


def answered(bell: Doorbell) -> list[str | None]:
    """Answer all rings, as a worker does."""
    return [bell.wait(1) for _ in range(bell.queue.count)]


@pytest.fixture
def bell(connection: Redis) -> Doorbell:
    return Doorbell(connection, "q")


def test_a_model_has_one_rq_job_however_often_it_rings_and_rings_again_once_answered(bell: Doorbell) -> None:
    for _ in range(2):
        for digests in ([TOY], [TOY, OTHER], [OTHER, TOY]):
            bell.ring(digests)
        assert bell.queue.count == 2
        assert answered(bell) == [TOY, OTHER]
        assert list(bell.queue.connection.scan_iter("rq:job:*")) == []
    assert bell.wait(1) is None


def test_no_function_of_an_rq_job_is_run(bell: Doorbell, connection: Redis) -> None:
    """Whoever can write to Redis can name any function."""
    bell.queue.enqueue_call("shutil.rmtree", args=("x",), job_id="foreign")
    bell.ring([TOY])
    assert answered(bell) == ["foreign", TOY]
    assert connection.keys("rq:job:*") == []


@pytest.mark.parametrize("lost", ["its worker died", "the queue is gone"])
def test_a_lost_ring_costs_nothing_but_a_minute(bell: Doorbell, connection: Redis, lost: str) -> None:
    bell.ring([TOY])
    if lost == "its worker died":
        assert connection.lpop(bell.queue.key) is not None
    else:
        connection.delete(bell.queue.key)
    bell.ring([TOY])
    assert bell.queue.count == 0  # until the lost one is forgotten
    age(connection, MINUTE_S)
    bell.ring([TOY])
    assert answered(bell) == [TOY]


def test_a_redis_that_is_full_or_away_is_not_rung_and_nothing_is_raised(bell: Doorbell, connection: Redis) -> None:
    with full(connection):
        bell.ring([TOY, OTHER])
    assert bell.queue.count == 0
    with connect("redis://127.0.0.1:1") as away:
        Doorbell(away, "q").ring([TOY])
