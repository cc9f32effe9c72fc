"""Each owner's list of jobs."""

import time

from redis import Redis

from service.store import keys
from service.store.creation import id_of
from service.store.jobs import JobStore
from tests.service.store.helpers import record


def members(connection: Redis) -> list[str]:
    return [raw.decode() for raw in connection.zrange(keys.index(""), 0, -1)]


def test_jobs_older_than_a_lifetime_leave_the_list(store: JobStore, connection: Redis) -> None:
    lifetime_s = store.settings.job_ttl_s + store.settings.job_timeout_s
    for job_id, age_s in (("old", lifetime_s + 2), ("young", lifetime_s - 60)):
        connection.zadd(keys.index(""), {f"{int((time.time() - age_s) * 1000)}-{job_id}": 0})
    jobs = []
    while any(id_of(member) == "old" for member in members(connection)):  # some of the new ones drop it
        assert len(jobs) < 1000
        jobs.append(record())
        store.create(jobs[-1])
        time.sleep(0.002)  # times have milliseconds
    assert [id_of(member) for member in members(connection)] == ["young", *(job.id for job in jobs)]
    assert 0 < connection.ttl(keys.index("")) <= lifetime_s


def test_only_the_clock_of_redis_counts(store: JobStore, connection: Redis) -> None:
    """An API whose clock is wrong neither drops live jobs from the list nor changes their order."""
    jobs = [record(created_at=time.time() + hours * 3600) for hours in (0, 9, -9)]
    for job in jobs:
        store.create(job)
        time.sleep(0.002)  # times have milliseconds
    assert [id_of(member) for member in members(connection)] == [job.id for job in jobs]
    assert all(abs(int(member[:13]) / 1000 - time.time()) < 60 for member in members(connection))
