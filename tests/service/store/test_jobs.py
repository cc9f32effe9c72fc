"""Jobs in Redis: creation in one command, status moves, commits and times to live."""

import contextlib
import logging
from collections.abc import Callable

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from service.store import keys, workers
from service.store.claims import GROUP, Claim, PictureStream
from service.store.connection import is_full, refuses_writes, text
from service.store.jobs import JobStore
from tests.service.store.helpers import DIGEST, RESULT, add_job, commands, commit_all, done, full, read_only, record

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


@pytest.mark.parametrize("end", ["finish", "fail", "cancel"])
def test_a_terminal_status_is_final(store: JobStore, a: PictureStream, connection: Redis, end: str) -> None:
    job = record()
    add_job(store, job)
    (grid,) = commit_all(store, a)
    store.unfinished([(job.id, 0)])  # marks it as running
    ends = {
        "finish": lambda: bool(store.finish(a, [(grid, RESULT)])),
        "fail": lambda: store.fail(job.id, "why"),
        "cancel": lambda: store.cancel(job.id),
    }
    assert ends.pop(end)()
    before = connection.hgetall(keys.job(job.id))
    assert store.unfinished([(job.id, 0)]) == set()
    assert not any(other() for other in ends.values())
    assert not store.fail(job.id, "another reason")
    assert connection.hgetall(keys.job(job.id)) == before
    assert store.ended([job.id]) == {job.id}


def test_a_job_without_all_of_its_pictures_does_not_finish(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job = record(2)
    add_job(store, job)
    assert store.complete(job.id) is None
    (grid,) = commit_all(store, a)
    found = store.complete(job.id)
    assert found is not None
    assert (found[0], [verdict.index for verdict in found[1]]) == (job, [0, 1])
    connection.hdel(keys.verdicts(job.id), "1")  # as after a crash of Redis that lost its last writes
    assert store.complete(job.id) is None
    assert store.finish(a, [(grid, RESULT)]) == set()
    assert store.ended([job.id, "nobody"]) == {"nobody"}


def test_a_job_that_is_gone_cannot_be_moved(store: JobStore, a: PictureStream, connection: Redis) -> None:
    assert store.unfinished([("nobody", 0)]) == set()
    assert not store.fail("nobody", "why")
    assert not store.cancel("nobody")
    assert store.complete("nobody") is store.record("nobody") is None
    assert store.finish(a, [(Claim("1-1", "nobody"), RESULT)]) == set()
    assert connection.exists(keys.job("nobody")) == 0


def test_no_key_of_an_open_job_expires_and_every_key_of_an_ended_one_does(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job = record(2)
    add_job(store, job)
    store.unfinished([(job.id, 0)])
    store.commit(a, [done(claim) for claim in a.claim_new(1)])

    def lifetimes_s() -> list[int]:
        return [connection.ttl(key) for key in connection.scan_iter(f"{keys.job(job.id)}*")]

    assert lifetimes_s() == [-1] * 4  # with the second picture, which is pending
    store.fail(job.id, "why")
    assert len(lifetimes_s()) == 3
    assert all(0 < lifetime_s <= store.settings.keep_s for lifetime_s in lifetimes_s())


def test_a_worker_asks_only_about_the_pictures_that_it_has_claimed(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    """A job may have ten thousands."""
    job, other = record(4), record(1)
    for one in job, other:
        add_job(store, one)
    claims = a.claim_new(5)
    asked = [claim.picture.key for claim in claims]
    assert store.unfinished([*asked, ("nobody", 0)]) == set(asked)
    store.commit(a, [done(claim) for claim in claims if claim.picture.index in (0, 2)])
    connection.config_resetstat()
    assert store.unfinished([(job.id, 3), (job.id, 2), (other.id, 0)]) == {(job.id, 3)}
    assert {"cmdstat_hkeys", "cmdstat_hgetall"}.isdisjoint(connection.info("commandstats"))
    store.cancel(job.id)
    assert store.unfinished(asked) == set()


def test_commit_returns_the_grids_to_compose_and_the_jobs_that_are_gone(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job, other, deleted, cancelled = record(2), record(1), record(1), record(1)
    for one in (job, other, deleted, cancelled):
        add_job(store, one)
    claims = a.claim_new(9)
    for one in (deleted, cancelled):
        store.cancel(one.id)
    store.delete(deleted.id)
    assert store.commit(a, [done(claims[0])]) == ([], set())
    assert store.done_count(job.id) == 1
    grids, gone = store.commit(a, [done(claim) for claim in claims[1:]])
    assert [(claim.job, claim.picture) for claim in grids] == [(other.id, None), (job.id, None)]
    assert gone == {deleted.id}
    assert store.finish(a, [(grid, RESULT) for grid in grids]) == {job.id, other.id}
    assert connection.xlen(a.key) == connection.xpending(a.key, GROUP)["pending"] == 0


def test_a_job_of_one_picture_ends_as_it_is_stored(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job, larger = record(1), record(2)
    add_job(store, job)
    add_job(store, larger)
    claims = a.claim_new(5)
    store.unfinished([(job.id, 0), (larger.id, 0)])
    results = {claim.picture.key: RESULT for claim in claims}
    grids, _ = store.commit(a, [done(claim) for claim in claims], results)
    assert [grid.job for grid in grids] == [larger.id]
    assert store.statuses([job.id, larger.id]) == {job.id: "finished", larger.id: "running"}
    assert connection.hget(keys.job(job.id), "result") == RESULT.write().encode()
    expected = [{b"status": b"running"}, {b"status": b"finished", b"last_picture": b"0"}]
    assert [fields for _, fields in connection.xrange(keys.events(job.id))] == expected
    lifetimes = [connection.ttl(key(job.id)) for key in (keys.job, keys.events, keys.verdicts)]
    assert all(0 < lifetime_s <= store.settings.keep_s for lifetime_s in lifetimes)
    assert store.commit(a, [done(claims[0])], results) == ([], set())


def test_pictures_stay_in_the_stream_if_they_cannot_be_stored(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job, broken = record(1), record(1)
    add_job(store, job)
    add_job(store, broken)
    claims = a.claim_new(5)
    connection.set(keys.verdicts(broken.id), "no hash")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        store.commit(a, [done(claim) for claim in claims])
    assert connection.xpending(a.key, GROUP)["pending"] == 2
    connection.delete(keys.verdicts(broken.id))
    grids, _ = store.commit(a, [done(claim) for claim in claims])
    assert {grid.job for grid in grids} == {job.id, broken.id}  # that of the first attempt, too
    assert connection.xlen(a.key) == 2


def test_the_first_of_two_commits_of_a_picture_is_kept_and_gives_the_only_grid(
    store: JobStore, a: PictureStream, b: PictureStream, connection: Redis
) -> None:
    job = record(1)
    add_job(store, job)
    (claim,) = a.claim_new(5)
    (grid,), _ = store.commit(a, [done(claim)])
    first = connection.hgetall(keys.verdicts(job.id))
    entry, again = done(claim)
    later = again.verdict.model_copy(update={"accuracy": 0.5})
    assert store.commit(b, [(entry, type(again)(again.picture, later, b""))], {(job.id, 0): RESULT}) == ([], set())
    assert connection.hgetall(keys.verdicts(job.id)) == first
    assert store.finish(a, [(grid, RESULT)]) == {job.id}


def test_a_picture_has_one_event_and_none_after_the_end(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job, cancelled = record(1), record(1)
    add_job(store, job)
    add_job(store, cancelled)
    first, second = a.claim_new(5)
    store.cancel(cancelled.id)
    store.commit(a, [done(first), done(first), done(second)])
    assert [fields for _, fields in connection.xrange(keys.events(job.id))] == [{b"picture": b"0"}]
    assert [fields for _, fields in connection.xrange(keys.events(cancelled.id))] == [{b"status": b"cancelled"}]
    assert not connection.exists(keys.verdicts(cancelled.id))


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


@pytest.mark.parametrize("state", [full, read_only])
def test_no_job_is_created_if_redis_refuses_writes(store: JobStore, connection: Redis, state: State) -> None:
    with state(connection), pytest.raises(ResponseError) as refused:
        add_job(store, record(1))
    assert refuses_writes(refused.value)
    assert list(connection.scan_iter()) == []


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
