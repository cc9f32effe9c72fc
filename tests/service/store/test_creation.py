"""Jobs of requests that arrive together: one message to Redis, and each request its own answer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys
from service.store.connection import connect_async
from service.store.creation import FEW, JobCreator, NoRoom
from service.store.jobs import JobStore
from service.store.pipeline import Pipeline
from tests.service.store.helpers import commands, record

Act = Callable[[JobCreator], Awaitable[Any]]


def creating(settings: Settings, store: JobStore, act: Act, connections: int = 1) -> Any:
    """Return what `act` returns, given a creator with so many connections to Redis."""

    async def run() -> Any:
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=connections) as connection:
            return await act(JobCreator(Pipeline(connection), settings, store.doorbell))

    return asyncio.run(run())


def together(*jobs: JobRecord) -> Act:
    """Return what creates the jobs at the same time, and returns each one's id or error."""

    async def act(creator: JobCreator) -> list[str | BaseException]:
        return await asyncio.gather(*(creator.create(job) for job in jobs), return_exceptions=True)

    return act


def test_jobs_that_arrive_together_share_a_connection(settings: Settings, store: JobStore, connection: Redis) -> None:
    jobs = [record(i % 3 + 1) for i in range(20)]
    sent = commands(connection, lambda: creating(settings, store, together(*jobs)))
    assert sent.count("FCALL") == 20
    assert len(sent) < 30  # and one ring for all
    assert store.doorbell.queue.count == 1
    assert [store.record(job.id) for job in jobs] == jobs
    assert connection.zcard(keys.OPEN) == 20


def test_each_gets_its_own_answer(settings: Settings, store: JobStore, connection: Redis) -> None:
    limited = settings.model_copy(update={"max_queued_pictures": 5})
    jobs = [record(4), record(2), record(1)]
    first, second, third = creating(limited, store, together(*jobs))
    assert (first, third) == (jobs[0].id, jobs[2].id)
    assert isinstance(second, NoRoom)
    assert (second.what, second.taken) == ("queue", 4)


def test_all_learn_that_redis_is_away(settings: Settings, store: JobStore) -> None:
    away = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1"})
    found = creating(away, store, together(record(), record()))
    assert [type(error) for error in found] == [ConnectionError] * 2


def test_a_request_that_is_cancelled_does_not_disturb_the_others(settings: Settings, store: JobStore) -> None:
    jobs = [record(), record(), record()]

    async def act(creator: JobCreator) -> list[str | BaseException]:
        requests = [asyncio.create_task(creator.create(job)) for job in jobs]
        await asyncio.sleep(0)  # until all have asked
        requests[0].cancel()
        return await asyncio.gather(*requests, return_exceptions=True)

    first, *others = creating(settings, store, act)
    assert isinstance(first, asyncio.CancelledError)
    assert others == [jobs[1].id, jobs[2].id]


def test_jobs_that_arrive_one_after_the_other_all_get_their_answers(settings: Settings, store: JobStore) -> None:
    early, late = [record() for _ in range(3)], [record() for _ in range(3)]

    async def act(creator: JobCreator) -> list[str | BaseException]:
        async def after(turns: int, job: JobRecord) -> str:
            for _ in range(turns):
                await asyncio.sleep(0)
            return await creator.create(job)

        asked = [*(after(0, job) for job in early), *(after(i + 1, job) for i, job in enumerate(late))]
        return await asyncio.gather(*asked)

    assert creating(settings, store, act, connections=4) == [job.id for job in [*early, *late]]


@pytest.mark.parametrize("pictures", [FEW, FEW + 1])
def test_small_and_large_jobs_are_written_alike(settings: Settings, store: JobStore, pictures: int) -> None:
    job = record(pictures)
    assert creating(settings, store, together(job)) == [job.id]
    assert store.record(job.id) == job
