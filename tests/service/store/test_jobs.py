"""The store, on Redis as it is and while it is full. `test_job_model.py` has the life of jobs."""

import contextlib
import logging
from collections.abc import Callable

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from service.store import keys, workers
from service.store.claims import PictureStream
from service.store.connection import is_full, text
from service.store.jobs import JobStore
from tests.service.store.helpers import DIGEST, RESULT, add_job, commands, commit_all, done, full, record

State = Callable[[Redis], contextlib.AbstractContextManager[None]]


def test_create_writes_a_job_in_one_command_and_rings(
    store: JobStore, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, rung = record(3), list[str]()
    monkeypatch.setattr(store.doorbell, "ring", lambda models: rung.extend(model.digest for model in models))
    assert commands(connection, lambda: add_job(store, job)) == ["FCALL"]
    assert rung == [DIGEST]
    assert store.record(job.id) == job
    assert store.statuses([job.id, "nobody"]) == {job.id: "queued", "nobody": None}
    assert connection.hgetall(keys.pending_counts(DIGEST)) == {b"": b"3"}


def test_the_log_says_how_a_job_ended_whose_record_cannot_be_read(
    store: JobStore, connection: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = record()
    add_job(store, job)
    connection.hset(keys.job(job.id), "record", "{")
    assert store.fail(job.id, "why")
    *_, line = map(vars, caplog.records)
    assert [line[name] for name in ("msg", "job_id", "reason")] == ["job failed", job.id, "why"]


def test_wanted_and_open_jobs_are_those_of_models_with_work(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job, judged = record(1), record(1, digest="e" * 64, sent=True, model="judge")
    for one in (job, judged):
        add_job(store, one)
    found = {model.digest: (model.name, model.is_evaluator) for model in store.wanted()}
    assert found == {DIGEST: ("toy", False), "e" * 64: ("judge", True)}
    assert [store.of_model(digest) for digest in (DIGEST, "e" * 64, "f" * 64)] == [[job.id], [judged.id], []]
    commit_all(store, a)
    assert [model.name for model in store.wanted()] == ["judge"]


def test_a_full_redis_refuses_new_jobs_and_lets_open_ones_end(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    jobs = [record(1) for _ in range(4)]
    for job in jobs:
        add_job(store, job)
    claims = a.claim_new(5)
    with full(connection):
        with pytest.raises(ResponseError) as refused:
            add_job(store, record(1))
        assert is_full(refused.value)
        workers.announce(connection, "w", {}, lease_s=60)
        assert workers.is_alive(connection, "w")
        assert store.unfinished([(jobs[0].id, 0)]) == {(jobs[0].id, 0)}
        (grid,), _ = store.commit(a, [done(claims[0])])
        assert store.finish(a, [(grid, RESULT)]) == {jobs[0].id}
        assert store.fail(jobs[1].id, "why")
        assert store.cancel(jobs[2].id)
        assert store.commit(a, [done(claims[3])], {(jobs[3].id, 0): RESULT}) == ([], set())
        a.discard([claim.entry for claim in claims])
        assert connection.xlen(a.key) == 0
        assert list(store.statuses(job.id for job in jobs).values()) == [
            "finished", "failed", "cancelled", "finished",
        ]  # fmt: skip
        assert all(store.delete(job.id) for job in jobs)
    assert [text(key) for key in connection.scan_iter("labelgrid:job:*")] == []
