"""Jobs of requests at the same time: one message to Redis, room for all, each its own answer. And pages of jobs."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError, ResponseError

from service.contract.errors import KeyReuse
from service.contract.records import JobRecord, new_job_id
from service.settings import Settings
from service.store import async_jobs, keys, workers
from service.store.async_jobs import AsyncJobs, IdempotentRequest, NoRoom
from service.store.claims import PictureStream
from service.store.connection import connect_async
from service.store.forecast import OpenJob
from service.store.jobs import JobStore
from tests.service.store.helpers import DIGEST, RESULT, add_job, commands, commit_all, record, stored

Act = Callable[[AsyncJobs], Awaitable[Any]]


def creating(settings: Settings, store: JobStore, act: Act, connections: int = 1) -> Any:
    """Return what `act` returns, given jobs with so many connections to Redis."""

    async def run() -> Any:
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=connections) as connection:
            return await act(AsyncJobs(connection, settings))

    return asyncio.run(run())


def together(*jobs: JobRecord) -> Act:
    """Return what creates the jobs at the same time, and returns each one's id or error."""

    async def act(creating: AsyncJobs) -> list[str | BaseException]:
        return await asyncio.gather(*(creating.create(job) for job in jobs), return_exceptions=True)

    return act


def test_jobs_that_arrive_together_share_a_connection(settings: Settings, store: JobStore, connection: Redis) -> None:
    jobs = [record(i % 3 + 1) for i in range(20)]
    sent = commands(connection, lambda: creating(settings, store, together(*jobs)))
    assert sent.count("FCALL") == 20
    assert len(sent) < 25
    assert connection.llen("rq:queue:labelgrid") == 1
    assert [stored(store, job.id) for job in jobs] == jobs
    assert connection.zcard(keys.DEADLINES) == 20


@pytest.mark.parametrize(("fresh_s", "share", "ahead"), [(3600.0, 1.0e-9, 2), (3600.0, 1.0e9, 5), (0.0, 1.0e-9, 5)])
def test_a_forecast_sees_jobs_that_came_since_as_far_as_reading_the_queue_takes_little_time(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch, fresh_s: float, share: float, ahead: int
) -> None:
    monkeypatch.setattr(workers, "FRESH_S", fresh_s)
    monkeypatch.setattr(async_jobs, "QUEUE_SHARE", share)
    workers.announce(
        store.connection, "w", {"models": [{"digest": DIGEST, "rows_per_s": 1.0, "max_pictures": 32}]}, lease_s=60
    )
    new = OpenJob("new", "", 9, 0, 0, 1.0)

    async def act(jobs: AsyncJobs) -> list[int]:
        found = []
        for size in (2, 3):
            await jobs.create(record(size))
            forecast = await jobs.forecast(DIGEST, new)
            assert forecast is not None
            found.append(forecast.ahead)
        return found

    assert creating(settings, store, act) == [2, ahead]


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

    async def act(creating: AsyncJobs) -> list[str | BaseException]:
        requests = [asyncio.create_task(creating.create(job)) for job in jobs]
        await asyncio.sleep(0)  # until all have asked
        requests[0].cancel()
        return await asyncio.gather(*requests, return_exceptions=True)

    first, *others = creating(settings, store, act)
    assert isinstance(first, asyncio.CancelledError)
    assert others == [jobs[1].id, jobs[2].id]


@pytest.fixture
def limited(settings: Settings) -> Settings:
    limits = {"max_queued_pictures": 10, "max_queued_pictures_per_owner": 5, "max_stored_pictures_per_owner": 100}
    return settings.model_copy(update={"api_keys": "a:x", **limits})


def full_of(connection: Redis, settings: Settings, job: JobRecord) -> tuple[str, int, int] | None:
    """Return what is full for a job, how much is taken, and the limit; or create it."""
    try:
        add_job(JobStore(connection, settings), job)
    except NoRoom as error:
        return error.what, error.taken, error.most
    return None


def test_simultaneous_requests_cannot_exceed_the_limit_together(connection: Redis, settings: Settings) -> None:
    limited = settings.model_copy(update={"max_queued_pictures": 10})
    with ThreadPoolExecutor(8) as pool:
        refused = sum(pool.map(lambda _: full_of(connection, limited, record(4)) is not None, range(8)))
    assert refused == 6
    assert connection.hgetall(keys.waiting(DIGEST)) == {"": "8"}
    assert connection.zcard(keys.DEADLINES) == 2


def test_a_job_larger_than_its_owners_share_leaves_the_others_theirs(connection: Redis, limited: Settings) -> None:
    assert full_of(connection, limited, record(30, "a")) is None  # an empty queue takes it
    assert full_of(connection, limited, record(1, "a")) == ("owner", 30, 5)
    assert full_of(connection, limited, record(6, "b")) == ("queue", 5, 10)
    assert full_of(connection, limited, record(5, "b")) is None
    assert full_of(connection, limited, record(1, "c")) == ("queue", 10, 10)


def test_without_keys_a_large_job_fills_the_queue_and_no_stored_pictures_are_counted(
    connection: Redis, limited: Settings
) -> None:
    open_to_all = limited.model_copy(update={"api_keys": ""})
    assert full_of(connection, open_to_all, record(101)) is None
    assert full_of(connection, open_to_all, record(1)) == ("queue", 101, 10)
    assert full_of(connection, open_to_all, record(1, digest="e" * 64)) is None
    assert not connection.exists(keys.stored(""))


def test_concurrent_requests_with_one_key_create_one_job(store: JobStore, connection: Redis) -> None:
    request = IdempotentRequest("", "key", "request")
    with ThreadPoolExecutor(8) as pool:
        (job_id,) = set(pool.map(lambda _: add_job(store, record(), request), range(8)))
    assert connection.zrange(keys.DEADLINES, 0, -1) == [job_id]
    assert 86400 - 60 < connection.ttl(request.redis_key) <= 86400
    with pytest.raises(KeyReuse):
        add_job(store, record(), IdempotentRequest("", "key", "another request"))


def test_one_who_waits_bears_that_redis_is_away_for_a_moment_only(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_jobs, "LOOK_AGAIN_S", 0.2)
    job_id = add_job(store, record())

    async def wait(jobs: AsyncJobs) -> None:
        def waiting() -> asyncio.Task[bool]:
            return asyncio.create_task(jobs.wait(job_id, 60, asyncio.get_running_loop().create_future()))

        here = jobs.redis.connection
        async with connect_async("redis://127.0.0.1:1", timeout_s=5, max_connections=1) as away:
            jobs.redis.connection = away
            with pytest.raises(ConnectionError):
                await waiting()
            found = waiting()
            await asyncio.sleep(0.05)
            jobs.redis.connection = here
        store.cancel(job_id)
        assert await found

    creating(settings, store, wait)


@pytest.mark.parametrize("ends", ["before it is watched", "after"])
def test_one_who_waits_for_a_new_job_hears_of_its_end_and_does_not_look(
    settings: Settings, store: JobStore, connection: Redis, ends: str
) -> None:
    async def wait(jobs: AsyncJobs) -> None:
        jobs.hub.start()
        with jobs.hub.watch("any") as watch:
            await watch.heard.wait()  # it listens
        job_id = await jobs.create(record())
        if ends != "after":
            store.cancel(job_id)
            with jobs.hub.watch("any") as watch:
                connection.publish(keys.CHANGES, '{"any": true}')
                await watch.heard.wait()  # what was published before is heard
        waiting = asyncio.create_task(jobs.wait(job_id, 60, asyncio.get_running_loop().create_future()))
        if ends == "after":
            await asyncio.sleep(0.05)
            store.cancel(job_id)
        assert await waiting
        await jobs.hub.close()

    assert "HGET" not in commands(connection, lambda: creating(settings, store, wait, connections=2))


def test_one_who_waits_asks_again_after_an_answer_that_did_not_come(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a connection that a proxy has dropped, which takes longer than the pause between two looks."""
    monkeypatch.setattr(async_jobs, "LOOK_AGAIN_S", 0.1)
    job_id = add_job(store, record())

    async def wait(jobs: AsyncJobs) -> None:
        ask, looks = jobs.redis.ask, list[Any]()

        async def asked(*commands: Any) -> list[Any]:
            looks.append(commands)
            if len(looks) == 1:
                await asyncio.sleep(0.3)
                raise ConnectionError("no answer")
            return await ask(*commands)

        monkeypatch.setattr(jobs.redis, "ask", asked)
        has_ended = await jobs.wait(job_id, 0.6, asyncio.get_running_loop().create_future())
        assert (has_ended, len(looks) > 1) == (False, True)

    creating(settings, store, wait)


@pytest.mark.parametrize("is_of_the_release_before", [False, True])
def test_the_grid_of_a_finished_job_is_known_without_its_result(
    settings: Settings, store: JobStore, connection: Redis, a: PictureStream, is_of_the_release_before: bool
) -> None:
    jobs = [record(2), record(1), record(1, repeats=2, kind="score"), record(1, uploaded=True, kind="score")]
    for job in jobs:
        add_job(store, job)

    async def grids(reading: AsyncJobs) -> list[int | str | None]:
        found = await asyncio.gather(*(reading.grid(job.id) for job in jobs), return_exceptions=True)
        return [type(one).__name__ if isinstance(one, BaseException) else one for one in found]

    assert creating(settings, store, grids) == ["NotReady"] * 4
    result = RESULT.model_copy(update={"repeats": RESULT.repeats * 2, "best": 1})
    ended = [(claim, result if claim.record.repeats == 2 else RESULT) for claim in commit_all(store, a)]
    store.finish(a, ended)
    if is_of_the_release_before:
        for job in jobs:
            connection.hdel(keys.job(job.id), "shown", "grid")
        assert creating(settings, store, grids) == [None, 0, 1, None]
    else:
        sent = commands(connection, lambda: creating(settings, store, grids))
        assert sent == ["HMGET"] * 4
        assert creating(settings, store, grids) == [None, 0, 1, None]


def test_pages_of_an_owners_jobs_are_sorted_by_the_time_in_the_ids(
    store: JobStore, connection: Redis, settings: Settings
) -> None:
    now = time.time() // 1
    ids = [new_job_id(now + s) for s in (3, 1, 2, 0, 4)]
    for one in ids:
        add_job(store, record(1, id=one))
    newest_first = sorted(ids, reverse=True)
    connection.delete(keys.job(newest_first[3]))  # it has expired

    async def read() -> list[list[str]]:
        pages, cursor = list[list[str]](), None
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=2) as client:
            while not pages or cursor:
                page = await AsyncJobs(client, settings).page("", 2, cursor)
                pages.append([one.id for one in page.jobs])
                cursor = page.next
        return pages

    assert asyncio.run(read()) == [newest_first[:2], newest_first[2:3], newest_first[4:]]


def test_an_error_of_a_single_command_is_raised(settings: Settings, store: JobStore, connection: Redis) -> None:
    connection.set("text", "x")

    async def ask(jobs: AsyncJobs) -> None:
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await jobs.redis.ask(("GET", "text"), ("HLEN", "text"))

    creating(settings, store, ask)
