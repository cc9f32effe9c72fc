"""Live workers: announced for a lease, withdrawn at once, known to the release before. Idle ones are woken by RQ."""

import asyncio
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from service.settings import Settings
from service.store import keys, workers
from service.store.connection import RetryUntilStopped, connect, connect_async
from service.store.functions import Pipeline
from tests.service.store.ageing import MINUTE_S, age
from tests.service.store.helpers import DIGEST, connect_bytes, full


def hosts(live: list[dict[str, Any]]) -> list[str]:
    return [about["host"] for about in live]


def test_live_workers_are_listed_and_dead_ones_are_not(connection: Redis) -> None:
    workers.announce(connection, "dead", {"host": "a"}, lease_s=50)
    age(connection, MINUTE_S)
    workers.announce(connection, "left", {"host": "b"}, lease_s=60)
    workers.announce(connection, "live", {"host": "c"}, lease_s=60)
    workers.withdraw(connection, "left")
    assert hosts(workers.list_live(connection)) == ["c"]
    assert [workers.is_alive(connection, name) for name in ("dead", "left", "live")] == [False, False, True]
    assert [one.name for one in Queue.all(connect_bytes(connection))] == [workers.QUEUE]


def test_a_worker_learns_that_rq_is_suspended(connection: Redis) -> None:
    assert not workers.announce(connection, "w", {}, lease_s=60)
    suspend(connection)
    assert workers.announce(connection, "w", {}, lease_s=60)
    resume(connection)
    assert not workers.announce(connection, "w", {}, lease_s=60)


def test_workers_of_this_release_and_the_one_before_see_each_other(connection: Redis) -> None:
    """As that one announces workers and lists them."""
    connection.sadd(keys.OLD_WORKERS, "old", "dead")
    connection.set(keys.old_worker("old"), '{"host": "a"}', px=60_000)
    workers.announce(connection, "new", {"host": "b"}, lease_s=60)
    assert sorted(hosts(workers.list_live(connection))) == ["a", "b"]
    assert workers.is_alive(connection, "old")
    assert connection.smembers(keys.OLD_WORKERS) == {"old", "dead", "new"}
    assert connection.get(keys.old_worker("new")) == '{"host": "b"}'
    workers.withdraw(connection, "new")
    assert hosts(workers.list_live(connection)) == ["a"]
    assert connection.get(keys.old_worker("new")) is None


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


def test_what_wakes_a_worker_is_an_rq_job_and_one_waits_at_most(connection: Redis) -> None:
    queue = Queue(workers.QUEUE, connection=connect_bytes(connection), serializer=JSONSerializer)
    for _ in range(2):
        workers.wake(connection)
        workers.wake(connection)
        (job,) = queue.jobs
        assert (job.func_name, job.args, job.timeout, job.get_status()) == (workers.TASK, [], -1, "queued")
        as_rq_writes_it = Job.create(workers.TASK, (), connection=queue.connection, serializer=JSONSerializer)
        assert (job.data, job.description) == (as_rq_writes_it.data, as_rq_writes_it.description)
        connection.lpop(queue.key)


def test_a_redis_that_is_full_or_away_is_not_asked_and_nothing_is_raised(connection: Redis) -> None:
    with full(connection):
        workers.wake(connection)
    assert connection.keys("rq:*") == []
    with connect("redis://127.0.0.1:1") as away:
        workers.wake(away)
