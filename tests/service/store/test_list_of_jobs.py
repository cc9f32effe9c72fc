"""Each owner's list of jobs."""

import asyncio
import time

import pytest
from redis import Redis

from service.contract.job_ids import new_job_id
from service.settings import Settings
from service.store import keys
from service.store.connection import connect_async
from service.store.jobs import JobStore
from service.store.reader import JobReader
from tests.service.store.helpers import add_job, record


def listed(connection: Redis) -> list[str]:
    return [raw.decode().partition("-")[2] for raw in connection.zrange(keys.index(""), 0, -1)]


@pytest.mark.parametrize("ahead_s", [0, 10**9])
def test_jobs_older_than_a_lifetime_leave_the_list(store: JobStore, connection: Redis, ahead_s: int) -> None:
    """And only these, also if the clock of an API is ahead."""
    lifetime_s = store.settings.keep_s + store.settings.job_timeout_s
    now = time.time() // 1 - 60
    for job_id, age_s in (("old", lifetime_s + 62), ("young", lifetime_s - 120)):
        connection.zadd(keys.index(""), {f"{int((now - age_s) * 1000)}-{job_id}": 0})
    ids = [new_job_id(now + ahead_s + ms / 1000) for ms in range(16)]  # one in sixteen drops it
    for one in ids:
        add_job(store, record(1, id=one))
    assert listed(connection) == ["young", *ids]
    assert 0 < connection.ttl(keys.index("")) <= lifetime_s


def test_pages_of_a_list_are_sorted_by_the_time_in_the_ids(
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
                page = await JobReader(client, settings.keep_s).page("", 2, cursor)
                pages.append([one.id for one in page.jobs])
                cursor = page.next
        return pages

    assert asyncio.run(read()) == [newest_first[:2], newest_first[2:3], newest_first[4:]]
