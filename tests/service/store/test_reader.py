"""Waiting for jobs: a request gets its job once it has ended, whatever else ends with it."""

import asyncio
import time

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service.contract.errors import ExpiredJob, NotReady, ServiceError, UnknownJob, UnknownPicture
from service.contract.job_ids import new_job_id
from service.contract.schemas import Job
from service.settings import Settings
from service.store import keys, reader
from service.store.claims import PictureStream
from service.store.connection import connect_async
from service.store.jobs import JobStore
from service.store.reader import JobReader
from tests.service.store.helpers import add_job, done, record


def test_jobs_that_end_together_and_one_that_ended_just_before_its_client_waits(
    settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "LOOK_AGAIN_S", 3600.0)  # each is told; no look finds it
    store = JobStore(connection, settings)
    early, first, second, unreadable = (record(1) for _ in range(4))
    for one in (early, first, second, unreadable):
        add_job(store, one)

    async def wait_for_all() -> list[Job | BaseException]:
        async with AsyncRedis.from_url(settings.redis_url, protocol=2, socket_timeout=None) as pool:
            jobs, gone = JobReader(pool, settings.keep_s), asyncio.get_running_loop().create_future()
            waiting = [
                asyncio.create_task(jobs.wait(one.id, 100, gone, is_new=True)) for one in (first, second, unreadable)
            ]
            jobs.hub.start()
            await asyncio.sleep(0.2)
            store.fail(early.id, "early")
            connection.hset(keys.job(unreadable.id), "result", "{")
            for one in (first, second, unreadable):
                store.fail(one.id, "together")
            done = await asyncio.gather(*waiting, return_exceptions=True)
            found = [*done, await jobs.wait(early.id, 100, gone, is_new=True)]
            await jobs.hub.close()
            return found

    *together, broken, ended_early = asyncio.run(wait_for_all())
    assert [one.error for one in (*together, ended_early) if isinstance(one, Job)] == ["together", "together", "early"]
    assert isinstance(broken, Exception)  # its own client's error only


def test_a_job_that_is_gone_is_expired_if_its_id_is_old_enough_and_else_unknown(
    settings: Settings, connection: Redis
) -> None:
    ids = {made_s: new_job_id(time.time() + made_s) for made_s in (0, 60 - settings.keep_s, -60 - settings.keep_s)}
    store = JobStore(connection, settings)
    deleted = record(1, owner="a", id=ids[0])
    add_job(store, deleted)

    async def read() -> list[str]:
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=2) as client:
            reader = JobReader(client, settings.keep_s)
            with pytest.raises(UnknownJob):
                await reader.check_owner(deleted.id, "b")
            await reader.check_owner(deleted.id, "a")
            store.cancel(deleted.id)
            store.delete(deleted.id)
            found = list[str]()
            for job_id in (*ids.values(), "made-up"):
                for ask in (reader.job(job_id), reader.check_owner(job_id, ""), reader.record(job_id)):
                    with pytest.raises(ServiceError) as error:
                        await ask
                    found.append(type(error.value).__name__)
            return found

    assert asyncio.run(read()) == ["UnknownJob"] * 6 + ["ExpiredJob"] * 3 + ["UnknownJob"] * 3


def test_why_a_job_has_no_such_picture(settings: Settings, store: JobStore, a: PictureStream) -> None:
    job = record(2)
    add_job(store, job)
    store.commit(a, [done(claim) for claim in a.claim_new(1)])

    async def read() -> list[type[Exception]]:
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=2) as client:
            reader, found = JobReader(client, settings.keep_s), list[type[Exception]]()
            for job_id, index in ((job.id, 0), (job.id, 1), (job.id, 2), ("nobody", 0)):
                with pytest.raises(ServiceError) as error:
                    await reader.check_picture(job_id, index)
                found.append(type(error.value))
            return found

    assert asyncio.run(read()) == [ExpiredJob, NotReady, UnknownPicture, UnknownJob]  # the first one's file is gone
