"""Compares what Redis holds with the model of `job_model.py`, after every step of test_job_model.py."""

from collections import Counter
from typing import Any

from redis import Redis

from service.store import keys
from service.store.claims import GROUP
from service.store.functions import call
from service.store.jobs import JobStore
from tests.service.store.job_model import DIGESTS, OWNERS, Job, Model


def check_jobs(connection: Redis, model: Model) -> None:
    """Check every job's state, verdicts, events and pending pictures, and each owner's list and stored pictures."""
    with connection.pipeline(transaction=False) as pipe:
        pipe.zrange(keys.DEADLINES, 0, -1, withscores=True)
        for job_id in model.jobs:
            pipe.hmget(keys.job(job_id), "dispatched", "total")
            pipe.hget(keys.job(job_id), "status")
            pipe.hkeys(keys.verdicts(job_id))
            pipe.xrange(keys.events(job_id))
        for owner in OWNERS:
            pipe.hgetall(keys.stored(owner))
            pipe.zrange(keys.jobs(owner), 0, -1)
        opened, *found = pipe.execute()
    of_owners, found = found[-2 * len(OWNERS) :], found[: -2 * len(OWNERS)]
    jobs = model.jobs
    assert dict(opened) == {i: job.overdue_at for i, job in jobs.items() if job.is_open}
    for job, counts, *results in zip(jobs.values(), *(found[i::4] for i in range(4)), strict=True):
        if job.is_open:
            assert set(range(*map(int, counts))) == job.pending
        if model.exists(job.record.id):
            _check_results(job, *results)
        else:
            assert results == [None, [], []]
    for owner, stored, listed in zip(OWNERS, of_owners[::2], of_owners[1::2], strict=True):
        assert {int(hour): int(count) for hour, count in stored.items()} == model.stored[owner]
        own = {job_id for job_id, job in jobs.items() if job.record.owner == owner and not job.is_deleted}
        assert {member.partition("-")[2] for member in listed} <= own


def _check_results(job: Job, status: Any, verdicts: Any, events: Any) -> None:
    assert status == job.status
    assert set(map(int, verdicts)) == job.stored
    moves = [fields["status"] for _, fields in events if "status" in fields]
    assert moves == job.moves  # so it ended once
    announced = [int(fields[name]) for _, fields in events for name in ("picture", "last_picture") if name in fields]
    assert sorted(announced) == sorted(job.stored)  # each was stored once


def check_queues(connection: Redis, model: Model) -> None:
    """Check the number of pending pictures by owner, the entries of the streams, and what is left to do."""
    with connection.pipeline(transaction=False) as pipe:
        for digest in DIGESTS:
            pipe.hgetall(keys.waiting(digest))
            pipe.zrange(keys.turns(digest), 0, -1)
            pipe.xrange(keys.pictures(digest))
            pipe.xpending_range(keys.pictures(digest), GROUP, "-", "+", count=1000)
        found: Any = pipe.execute(raise_on_error=False)  # a stream without entries may have no group
    for digest, counts, owners, stream, claimed in zip(DIGESTS, *(found[i::4] for i in range(4)), strict=True):
        pending = {owner: int(n) for owner, n in counts.items()}
        assert Counter(pending) == model.pending(digest)
        assert all(pending.values())  # the others are forgotten
        assert pending.keys() <= set(owners)
        entries = model.entries[digest]
        assert [name for name, _ in stream] == list(entries)
        if entries:
            deliveries = {one["message_id"]: one["times_delivered"] for one in claimed}
            assert deliveries == {name: entry.deliveries for name, entry in entries.items()}


def check_work(store: JobStore, model: Model) -> None:
    """Check which models and jobs have work, as workers ask for it."""
    assert {one.digest for one in store.wanted()} == model.wanted()
    overdue = {i for i, job in model.jobs.items() if job.is_open and job.overdue_at <= model.clock}
    assert {i for i, _ in call(store.connection, "overdue")} == overdue
    for digest in DIGESTS:
        assert set(store.of_model(digest)) == {job.record.id for job in model.of(digest) if job.is_open}
