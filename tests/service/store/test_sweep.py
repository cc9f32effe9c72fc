"""Sweeps: overdue jobs fail by the clock of Redis, and dead workers and old files are seen to now and then."""

import time

import pytest
from redis import Redis

from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from service.store.sweep import OVERDUE, Sweeper
from tests.service.store.helpers import add_job, record


@pytest.fixture
def sweeper(store: JobStore) -> Sweeper:
    return Sweeper(store)


def test_a_sweep_forgets_dead_workers_but_does_not_look_for_them_each_time(sweeper: Sweeper, connection: Redis) -> None:
    connection.sadd(keys.WORKERS, "dead")
    sweeper.sweep()
    assert connection.scard(keys.WORKERS) == 0
    connection.sadd(keys.WORKERS, "dead")
    sweeper.sweep()
    assert connection.scard(keys.WORKERS) == 1


def test_only_the_clock_of_redis_makes_a_job_overdue(store: JobStore, sweeper: Sweeper, connection: Redis) -> None:
    day_s = 86400
    late, past, future = (record(created_at=time.time() + days * day_s) for days in (0, -1, 10**6))
    for job in (late, past, future):
        add_job(store, job)
    sweeper.sweep()
    assert store.ended([late.id, past.id, future.id]) == set()
    connection.zadd(keys.OPEN, {late.id: connection.time()[0]})
    assert store.overdue() == [late.id]
    sweeper.sweep()
    assert store.statuses([late.id]) == {late.id: "failed"}
    assert connection.hget(keys.job(late.id), "error") == OVERDUE.encode()
    assert store.ended([late.id, past.id, future.id]) == {late.id}


def test_open_jobs_keep_their_deadline_when_the_setting_changes(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    job = record()
    add_job(store, job)
    Sweeper(JobStore(connection, settings.model_copy(update={"keep_days": 1, "job_timeout_s": 1}))).sweep()
    assert store.ended([job.id]) == set()
