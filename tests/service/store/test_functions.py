"""How the functions come into Redis: versions side by side, and a library that is missing when it is called."""

import asyncio

import pytest
from redis import Redis

from service.settings import Settings
from service.store import functions, workers
from service.store.async_jobs import AsyncJobs
from service.store.connection import OldRedis, check_version, connect_async, text
from service.store.jobs import JobStore
from tests.service.store.helpers import record

OF_ANOTHER = functions.SOURCE.replace(functions.VERSION, "another")


def libraries(connection: Redis) -> set[str]:
    return {text(library[1]) for library in connection.function_list()}


@pytest.fixture
def without_library(connection: Redis) -> Redis:
    connection.function_flush()
    return connection


def test_a_call_loads_the_library_if_it_is_missing(without_library: Redis) -> None:
    assert functions.call(without_library, "live_workers") == []
    assert libraries(without_library) == {functions.LIBRARY}


def test_the_event_loop_loads_the_library_too(without_library: Redis, settings: Settings) -> None:
    store = JobStore(without_library, settings)
    jobs = [record(1) for _ in range(3)]

    async def run() -> None:
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=4) as client:
            async_jobs = AsyncJobs(client, settings, store.doorbell)
            ids = await asyncio.gather(*(async_jobs.create(job) for job in jobs))
            assert ids == [job.id for job in jobs]
            without_library.function_flush()
            assert (await async_jobs.job(jobs[0].id)).status == "queued"

    asyncio.run(run())
    assert without_library.zcard("labelgrid:deadlines") == 3


def test_a_former_version_is_removed_once_no_worker_uses_it(without_library: Redis) -> None:
    without_library.function_load(OF_ANOTHER)
    without_library.function_load("#!lua name=foreign\nredis.register_function('foreign', function() end)")
    workers.announce(without_library, "new", {}, 60)
    functions.call(without_library, "announce", "old", '{"library": "labelgrid_another"}', 60_000)
    workers.forget_dead(without_library)
    assert libraries(without_library) == {functions.LIBRARY, "labelgrid_another", "foreign"}
    workers.withdraw(without_library, "old")
    workers.forget_dead(without_library)
    assert libraries(without_library) == {functions.LIBRARY, "foreign"}


def test_a_redis_before_version_7_is_refused(
    settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_version(settings.redis_url)
    check_version("redis://127.0.0.1:1")  # which is away
    monkeypatch.setattr(Redis, "info", lambda *_: {"redis_version": "6.2.22"})
    with pytest.raises(OldRedis, match=r"is Redis 6\.2\.22: upgrade it to Redis 7 or later, or to Valkey"):
        check_version(settings.redis_url)
