"""Jobs whose time is over fail, by the clock of Redis."""

import time

from redis import Redis

from service.settings import Settings
from service.store import keys
from service.store.jobs import OVERDUE, JobStore
from tests.service.store.helpers import add_job, record


def test_only_the_clock_of_redis_makes_a_job_overdue(store: JobStore, connection: Redis) -> None:
    day_s = 86400
    late, past, future = (record(created_at=time.time() + days * day_s) for days in (0, -1, 10**6))
    for job in (late, past, future):
        add_job(store, job)
    store.fail_overdue()
    assert store.ended([late.id, past.id, future.id]) == set()
    connection.zadd(keys.OPEN, {late.id: connection.time()[0]})
    assert store.overdue() == [late.id]
    store.fail_overdue()
    assert store.statuses([late.id]) == {late.id: "failed"}
    assert connection.hget(keys.job(late.id), "error") == OVERDUE.encode()
    assert store.ended([late.id, past.id, future.id]) == {late.id}


def test_open_jobs_keep_their_deadline_when_the_setting_changes(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    job = record()
    add_job(store, job)
    JobStore(connection, settings.model_copy(update={"keep_days": 1, "job_timeout_s": 1})).fail_overdue()
    assert store.ended([job.id]) == set()
