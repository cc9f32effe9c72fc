"""Waiting for jobs: a request gets its job once it has ended, whatever else ends with it."""

import asyncio
import time

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service.contract.schemas import Job
from service.settings import Settings
from service.store import keys, reader
from service.store.jobs import JobStore
from service.store.reader import JobReader
from tests.service.store.helpers import record


def test_jobs_that_end_together_and_one_that_ended_just_before_its_client_waits(
    settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "LOOK_AGAIN_S", 14.0)  # each is told; no look finds it
    store = JobStore(connection, settings)
    early, first, second, unreadable = (record(1) for _ in range(4))
    for one in (early, first, second, unreadable):
        store.create(one)

    async def wait_for_all() -> list[Job | BaseException]:
        async with AsyncRedis.from_url(settings.redis_url, protocol=2) as pool:
            jobs, gone = JobReader(pool), asyncio.get_running_loop().create_future()
            waiting = [
                asyncio.create_task(jobs.wait(one.id, 30, gone, is_new=True)) for one in (first, second, unreadable)
            ]
            await asyncio.sleep(0.2)
            store.fail(early.id, "early")
            connection.hset(keys.job(unreadable.id), "result", "{")
            for one in (first, second, unreadable):
                store.fail(one.id, "together")
            done = await asyncio.gather(*waiting, return_exceptions=True)
            found = [*done, await jobs.wait(early.id, 30, gone, is_new=True)]
            await jobs.endings.close()
            return found

    begun = time.monotonic()
    *together, broken, ended_early = asyncio.run(wait_for_all())
    assert time.monotonic() - begun < reader.LOOK_AGAIN_S
    assert [one.error for one in (*together, ended_early) if isinstance(one, Job)] == ["together", "together", "early"]
    assert isinstance(broken, Exception)  # its own client's error only


def test_a_search_for_one_job_takes_few_round_trips(
    settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, trips, pipeline = JobStore(connection, settings), list[None](), AsyncRedis.pipeline
    jobs = [record(1) for _ in range(250)]
    for one in jobs:
        store.create(one)

    def counted(redis: AsyncRedis, *arguments: bool, **options: bool) -> object:
        trips.append(None)
        return pipeline(redis, *arguments, **options)

    async def search() -> None:
        async with AsyncRedis.from_url(settings.redis_url, protocol=2) as pool:
            monkeypatch.setattr(AsyncRedis, "pipeline", counted)
            assert (await JobReader(pool).page("", 1, None, "no such label")).jobs == []

    asyncio.run(search())
    assert len(trips) == 3
