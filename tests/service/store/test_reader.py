"""Waiting for jobs: a request gets its job once it has ended, whatever else ends with it."""

import asyncio
import time

from redis import Redis

from service.contract.job_ids import new_job_id
from service.settings import Settings
from service.store import keys
from service.store.connection import connect_async
from service.store.jobs import JobStore
from service.store.reader import JobReader
from tests.service.store.helpers import add_job, record


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
                page = await JobReader(client, settings.keep_s).page("", 2, cursor)
                pages.append([one.id for one in page.jobs])
                cursor = page.next
        return pages

    assert asyncio.run(read()) == [newest_first[:2], newest_first[2:3], newest_first[4:]]
