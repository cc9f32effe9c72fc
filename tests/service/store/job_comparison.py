"""Compares what Redis holds with the model of `job_model.py`, after every step of test_job_model.py."""

from collections import Counter
from typing import Any

from redis import Redis

from service.store import keys
from service.store.claims import GROUP
from service.store.connection import text
from tests.service.store.job_model import DIGESTS, OWNERS, Job, Model


def check_jobs(connection: Redis, model: Model) -> None:
    """Check every job's state, pictures, events, pending pictures and tombstone."""
    with connection.pipeline(transaction=False) as pipe:
        pipe.smembers(keys.OPEN)
        for job_id in model.jobs:
            pipe.exists(keys.tombstone(job_id))
            pipe.llen(keys.pending(job_id))
            pipe.hmget(keys.job(job_id), ["status", "bytes"])
            pipe.hgetall(keys.png(job_id))
            pipe.hkeys(keys.verdicts(job_id))
            pipe.xrange(keys.events(job_id))
        pipe.xrange(keys.ENDED)
        opened, *found, ended = pipe.execute()
    assert {text(raw) for raw in opened} == {job.record.id for job in model.open_jobs()}
    told = sorted(text(fields[b"job"]) for _, fields in ended)  # those who wait for one
    assert told == sorted(job.record.id for job in model.jobs.values() if not job.is_open)
    for job, tombstone, pending, *results in zip(model.jobs.values(), *(found[i::6] for i in range(6)), strict=True):
        assert bool(tombstone) == model.remembers(job)
        assert pending == len(job.pending)
        if model.exists(job):
            _check_results(job, *results)
        else:
            assert results == [[None, None], {}, [], []]


def _check_results(job: Job, head: Any, pngs: Any, verdicts: Any, events: Any) -> None:
    assert text(head[0]) == job.status
    assert int(head[1] or 0) == job.bytes
    stored = {b"%d" % index: png for index, png in job.stored.items()}
    assert {name: png for name, png in pngs.items() if name != keys.GRID.encode()} == stored
    assert set(verdicts) == stored.keys()
    moves = [text(fields[b"status"]) for _, fields in events if b"status" in fields]
    assert moves == job.moves  # so it ended once
    announced = [int(fields[name]) for _, fields in events for name in (b"picture", b"last_picture") if name in fields]
    assert sorted(announced) == sorted(job.stored)


def check_queues(connection: Redis, model: Model) -> None:
    """Check the number of pending pictures by owner, and the pictures in the streams with their deliveries."""
    for digest in DIGESTS:
        pending = {text(owner): int(n) for owner, n in connection.hgetall(keys.pending_counts(digest)).items()}
        assert Counter(pending) == model.pending(digest)
        assert all(pending.values())  # the others are forgotten
        assert pending.keys() <= set(map(text, connection.zrange(keys.owners(digest), 0, -1)))
        entries, stream = model.entries[digest], keys.stream(digest)
        assert [text(name) for name, _ in connection.xrange(stream)] == list(entries)
        claimed: Any = connection.xpending_range(stream, GROUP, "-", "+", count=1000)
        deliveries = {text(one["message_id"]): one["times_delivered"] for one in claimed}
        assert deliveries == {name: entry.deliveries for name, entry in entries.items()}


def check_bytes(connection: Redis, model: Model) -> None:
    """Check each owner's counted bytes."""
    now = connection.time()[0]
    for owner in OWNERS:
        pairs = [raw.split() for raw in connection.hvals(keys.stored_bytes(owner))]
        counted = sum(int(size) for expires, size in pairs if int(expires) > now)
        least, most = model.stored_bytes(owner)
        assert least <= counted <= most
