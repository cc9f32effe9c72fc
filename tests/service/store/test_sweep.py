"""Sweeps: jobs that RQ lost are queued again, overdue ones fail, and healthy ones are left alone."""

import time

import pytest
from redis import Redis
from rq.job import Job as RqJob
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys
from service.store.claims import GROUP, PictureStream
from service.store.jobs import JobStore
from service.store.sweep import JOBS_PER_SWEEP, Sweeper
from tests.service.store.helpers import DIGEST, record


@pytest.fixture
def sweeper(store: JobStore) -> Sweeper:
    return Sweeper(store)


def lose(store: JobStore, connection: Redis, job: JobRecord, how: str) -> None:
    """Make RQ lose the job, or leave it with worker `w`."""
    rq_id = connection.hget(keys.job(job.id), "rq")
    assert isinstance(rq_id, bytes)
    rq_job = RqJob.fetch(rq_id.decode(), connection=connection, serializer=JSONSerializer)
    if how == "deleted":
        rq_job.delete()
    elif how == "failed":
        rq_job.set_status(JobStatus.FAILED)
    elif how == "dequeued":
        connection.lpop(store.queue.key)
    else:
        connection.lpop(store.queue.key)
        connection.hset(rq_job.key, mapping={"status": "started", "worker_name": "w"})


@pytest.mark.parametrize("how", ["deleted", "failed", "dequeued", "started by a dead worker"])
def test_a_job_that_rq_lost_is_queued_again_once(
    store: JobStore, sweeper: Sweeper, connection: Redis, how: str
) -> None:
    job = record()
    store.create(job)
    lose(store, connection, job, how)
    connection.delete(store.queue.key)
    sweeper.sweep()
    assert connection.llen(store.queue.key) == 0  # it may be on its way to a worker
    sweeper.sweep()
    assert connection.llen(store.queue.key) == 1
    sweeper.sweep()
    sweeper.sweep()
    assert connection.llen(store.queue.key) == 1


def test_a_sweep_forgets_dead_workers_but_does_not_look_for_them_each_time(sweeper: Sweeper, connection: Redis) -> None:
    connection.sadd(keys.WORKERS, "dead")
    sweeper.sweep()
    assert connection.scard(keys.WORKERS) == 0
    connection.sadd(keys.WORKERS, "dead")
    sweeper.sweep()
    assert connection.scard(keys.WORKERS) == 1


def test_sweeps_reach_every_job_and_each_one_is_short(store: JobStore, sweeper: Sweeper, connection: Redis) -> None:
    jobs = [record() for _ in range(2 * JOBS_PER_SWEEP)]
    for job in jobs:
        store.create(job)
    lose(store, connection, jobs[7], "failed")
    connection.lrem(store.queue.key, 1, connection.hget(keys.job(jobs[7].id), "rq"))  # type: ignore[arg-type]
    before = connection.info("stats")["total_commands_processed"]
    sweeper.sweep()
    assert connection.info("stats")["total_commands_processed"] - before < 3 * JOBS_PER_SWEEP
    for _ in range(10):
        sweeper.sweep()
    assert connection.llen(store.queue.key) == 2 * JOBS_PER_SWEEP


def test_healthy_jobs_are_left_alone(store: JobStore, sweeper: Sweeper, connection: Redis, alive: JobStore) -> None:
    taken, waiting, ended = (record() for _ in range(3))
    for job in (taken, waiting, ended):
        store.create(job)
    lose(store, connection, taken, "started by a worker")  # which lives
    store.fail(ended.id, "why")
    connection.sadd(keys.OPEN, ended.id, "nobody")
    for _ in range(3):
        sweeper.sweep()
    assert connection.smembers(keys.OPEN) == {taken.id.encode(), waiting.id.encode()}
    assert connection.lrange(store.queue.key, 0, -1) == [connection.hget(keys.job(waiting.id), "rq")]
    assert store.statuses([waiting.id]) == {waiting.id: "queued"}


def test_jobs_of_a_loaded_model_that_wait_in_rqs_queue_are_not_looked_at(store: JobStore, connection: Redis) -> None:
    sweeper = Sweeper(store, has_model=lambda digest: digest == DIGEST)
    jobs = [record() for _ in range(50)]
    for job in jobs:
        store.create(job)

    def looked_at() -> int:
        before = connection.info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"]
        sweeper.sweep()
        return int(connection.info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"]) - before

    assert [looked_at(), looked_at()] == [0, 0]
    lose(store, connection, jobs[0], "dequeued")  # as a worker does that takes the first one
    assert looked_at() == 1
    connection.lpop(store.queue.key)
    store.requeue(jobs[1].id)  # of its new RQ job, the queue tells nothing
    connection.rpush(store.queue.key, "not-of-us")
    assert looked_at() == 2
    sweeper.has_model = lambda digest: False
    assert looked_at() == 50


def test_a_job_that_waits_in_rqs_queue_fails_when_its_time_is_over(connection: Redis, settings: Settings) -> None:
    store = JobStore(connection, settings.model_copy(update={"job_timeout_s": 1}))
    sweeper = Sweeper(store, has_model=lambda digest: True)
    job = record()
    store.create(job)
    sweeper.sweep()
    time.sleep(1.1)
    sweeper.sweep()
    assert store.statuses([job.id]) == {job.id: "failed"}


def test_a_job_waits_for_another_worker_only_while_nobody_has_its_pictures(
    store: JobStore, sweeper: Sweeper, a: PictureStream, connection: Redis
) -> None:
    job = record(2)
    store.create(job)

    def waits() -> bool:
        sweeper.sweep()
        return sweeper.waiting == {DIGEST: job.id}

    assert waits()
    claims = a.claim_new(1)
    store.begin(job.id)
    assert waits()  # for its second picture
    claims += a.claim_new(1)
    assert not waits()  # although its RQ job is still in the queue
    connection.xclaim(a.key, GROUP, "a", 0, [claims[0].entry], idle=10**9, justid=True)  # as if worker `a` died
    assert waits()


def test_every_sweep_sees_that_another_model_is_wanted_however_many_jobs_are_open(
    store: JobStore, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`WantedModels` forgets a model that it has not seen for some seconds."""
    monkeypatch.setattr("service.store.sweep.JOBS_PER_SWEEP", 1)
    for _ in range(600):
        store.create(record(1))
    other = record(1, digest="e" * 64)
    store.create(other)
    sweeper, seen = Sweeper(store, has_model=lambda digest: digest == DIGEST), []
    for _ in range(5):
        sweeper.sweep()
        seen.append(sweeper.waiting)
    assert seen == [{other.digest: other.id}] * 5


def set_overdue(connection: Redis, job: JobRecord) -> None:
    connection.hset(keys.job(job.id), "overdue_at", connection.time()[0])


def test_only_the_clock_of_redis_makes_a_job_overdue(store: JobStore, sweeper: Sweeper, connection: Redis) -> None:
    day_s = 86400
    late, from_the_past, from_the_future = (
        record(),
        record(created_at=time.time() - day_s),
        record(created_at=day_s * 1e6),
    )
    for job in (late, from_the_past, from_the_future):
        store.create(job)
    sweeper.sweep()
    assert store.is_open(late.id)
    set_overdue(connection, late)
    sweeper.sweep()
    assert store.statuses([late.id]) == {late.id: "failed"}
    assert store.is_open(from_the_past.id)
    assert store.is_open(from_the_future.id)


def test_open_jobs_keep_their_deadline_when_the_setting_changes(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    job = record()
    store.create(job)
    Sweeper(JobStore(connection, settings.model_copy(update={"job_ttl_s": 86400, "job_timeout_s": 1}))).sweep()
    assert store.is_open(job.id)


def test_pending_pictures_of_a_deleted_job_are_removed(
    store: JobStore, sweeper: Sweeper, a: PictureStream, connection: Redis
) -> None:
    gone, other = record(3), record(2)
    for job in (gone, other):
        store.create(job)
    connection.delete(keys.job(gone.id))
    sweeper.sweep()
    assert connection.smembers(keys.OPEN) == {other.id.encode()}
    assert connection.hgetall(keys.pending_counts(DIGEST)) == {b"": b"2"}
    assert connection.lrange(keys.owner_jobs(DIGEST, ""), 0, -1) == [other.id.encode()]
    assert list(connection.scan_iter(f"{keys.job(gone.id)}*")) == []
    assert [claim.picture.job for claim in a.claim_new(5)] == [other.id] * 2
