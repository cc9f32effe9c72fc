"""Sweeps: overdue jobs fail by the clock of Redis, and dead workers and old files are seen to now and then."""

import time

import pytest
from redis import Redis

from service.settings import Settings
from service.store import keys
from service.store.claims import PictureStream
from service.store.jobs import JobStore
from service.store.sweep import OVERDUE, Sweeper, is_time_to_prune
from tests.service.store.ageing import MINUTE_S, age
from tests.service.store.helpers import DIGEST, add_job, commands, record


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


def test_a_sweep_is_one_command_however_many_jobs_are_open(
    store: JobStore, sweeper: Sweeper, connection: Redis
) -> None:
    for _ in range(50):
        add_job(store, record(1))
    sweeper.sweep()
    assert commands(connection, sweeper.sweep) == ["FCALL"]


def test_open_jobs_keep_their_deadline_when_the_setting_changes(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    job = record()
    add_job(store, job)
    Sweeper(JobStore(connection, settings.model_copy(update={"keep_days": 1, "job_timeout_s": 1}))).sweep()
    assert store.ended([job.id]) == set()


def test_pictures_of_a_job_that_is_gone_leave_the_queue(
    store: JobStore, sweeper: Sweeper, a: PictureStream, connection: Redis
) -> None:
    gone, other = record(3), record(2)
    for job in (gone, other):
        add_job(store, job)
    connection.delete(keys.job(gone.id))
    connection.zadd(keys.OPEN, {gone.id: 1})
    sweeper.sweep()
    assert connection.zrange(keys.OPEN, 0, -1) == [other.id.encode()]
    claims = a.claim_new(9)
    wanted = store.unfinished(claim.picture.key for claim in claims)
    assert wanted == {(other.id, 0), (other.id, 1)}
    assert not connection.exists(keys.pending_counts(DIGEST), keys.pending(gone.id), keys.owner_jobs(DIGEST, ""))


def test_one_process_an_hour_removes_old_files(connection: Redis) -> None:
    assert [is_time_to_prune(connection) for _ in range(2)] == [True, False]
    age(connection, 60 * MINUTE_S)
    assert is_time_to_prune(connection)
