"""Jobs in Redis: creation in one command, status moves, commits and times to live."""

import contextlib
import logging
import zlib
from collections.abc import Callable

import pytest
from redis import Redis
from redis.exceptions import ResponseError
from rq.job import Job as RqJob

from service.store import keys, workers
from service.store.claims import GROUP, PictureStream
from service.store.connection import is_full, refuses_writes, text
from service.store.creation import RUN_JOB
from service.store.jobs import JobStore
from tests.service.store.helpers import DIGEST, RESULT, commands, done, full, read_only, record

State = Callable[[Redis], contextlib.AbstractContextManager[None]]


def test_create_writes_job_pictures_and_rq_job_in_one_command(store: JobStore, connection: Redis) -> None:
    job = record(3)
    assert commands(connection, lambda: store.create(job)) == ["FCALL"]
    assert store.record(job.id) == job
    assert store.statuses([job.id, "nobody"]) == {job.id: "queued", "nobody": None}
    assert connection.hgetall(keys.pending_counts(DIGEST)) == {b"": b"3"}
    assert connection.llen(store.queue.key) == 1


def test_the_rq_job_is_as_rq_itself_stores_it_without_empty_fields(store: JobStore, connection: Redis) -> None:
    def stored() -> dict[bytes, bytes]:
        fields: dict[bytes, bytes] = connection.hgetall(RqJob.key_for(store.queue.get_job_ids()[-1]))
        return {**fields, b"data": zlib.decompress(fields[b"data"])}

    job = record(1)
    store.create(job)
    by_script = stored()
    store.requeue(job.id)
    by_rq = {name: value for name, value in stored().items() if value}
    times = ("created_at", "enqueued_at")
    assert [len(by_script.pop(name.encode())) for name in times] == [len(by_rq.pop(name.encode())) for name in times]
    assert by_script == by_rq
    fetched = store.queue.fetch_job(store.queue.get_job_ids()[0])
    assert fetched is not None
    assert (fetched.func_name, fetched.args, fetched.get_status()) == (RUN_JOB, [job.id], "queued")


def test_a_job_that_was_deleted_does_not_come_back_when_a_worker_queues_it_again(
    store: JobStore, connection: Redis
) -> None:
    """As one that stops while it loads the job's model, which takes a while."""
    job = record()
    store.create(job)
    assert store.cancel(job.id)
    assert store.delete(job.id)
    store.requeue(job.id)
    assert not connection.exists(keys.job(job.id))


def test_the_log_says_how_a_job_ended_whose_record_cannot_be_read(
    store: JobStore, connection: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = record()
    store.create(job)
    connection.hset(keys.job(job.id), "record", "{")
    assert store.fail(job.id, "why")
    *_, line = map(vars, caplog.records)
    assert [line[name] for name in ("msg", "job_id", "reason")] == ["job failed", job.id, "why"]


@pytest.mark.parametrize("end", ["finish", "fail", "cancel"])
def test_a_terminal_status_is_final(store: JobStore, a: PictureStream, connection: Redis, end: str) -> None:
    job = record()
    store.create(job)
    store.commit(a.key, [done(claim) for claim in a.claim_new(5)])
    assert store.begin(job.id)
    assert not store.begin(job.id)
    ends = {
        "finish": lambda: store.finish({job.id: (RESULT, b"grid")}),
        "fail": lambda: store.fail(job.id, "why"),
        "cancel": lambda: store.cancel(job.id),
    }
    assert ends.pop(end)()
    before = connection.hgetall(keys.job(job.id))
    assert not store.begin(job.id)
    assert not any(other() for other in ends.values())
    assert not store.fail(job.id, "another reason")
    assert connection.hgetall(keys.job(job.id)) == before
    assert not connection.sismember(keys.OPEN, job.id)


def test_a_job_without_all_of_its_pictures_does_not_finish(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job = record(2)
    store.create(job)
    store.commit(a.key, [done(claim) for claim in a.claim_new(5)])
    assert len(store.open_verdicts([job.id])) == 1
    connection.hdel(keys.verdicts(job.id), "1")  # as after a crash of Redis that lost its last writes
    assert store.open_verdicts([job.id]) == []
    assert not store.finish({job.id: (RESULT, b"grid")})
    assert store.is_open(job.id)


def test_a_job_that_is_gone_cannot_be_moved(store: JobStore, connection: Redis) -> None:
    assert not store.begin("nobody")
    assert not store.fail("nobody", "why")
    assert not store.cancel("nobody")
    assert connection.exists(keys.job("nobody")) == 0


def test_all_keys_of_a_finished_job_expire(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job = record(1)
    store.create(job)
    store.commit(a.key, [done(claim) for claim in a.claim_new(5)])
    store.finish({job.id: (RESULT, b"grid")})
    of_job = [keys.job(job.id), keys.verdicts(job.id), keys.png(job.id), keys.events(job.id)]
    assert all(0 < connection.ttl(key) <= store.settings.job_ttl_s for key in of_job)
    remembered_s = store.settings.job_timeout_s + store.settings.job_ttl_s + store.settings.remembered_s
    assert 0 <= remembered_s - connection.ttl(keys.tombstone(job.id)) < 60


def test_no_key_of_an_open_job_expires_and_every_key_of_an_ended_one_does(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job, judged = record(2), record(1)
    store.create(job)
    store.create(judged, uploaded=[b"png"])
    store.begin(job.id)
    store.commit(a.key, [done(claim) for claim in a.claim_new(1)])

    def lifetimes_s() -> list[int]:
        found = [key for one in (job, judged) for key in connection.scan_iter(f"{keys.job(one.id)}*")]
        return [connection.ttl(key) for key in found if not key.endswith(b":waiting")]

    tombstones = [keys.tombstone(one.id) for one in (job, judged)]
    assert lifetimes_s() == [-1] * 6  # each has its hash and PNGs, the begun one also events and verdicts
    longest_s = store.settings.job_timeout_s + store.settings.job_ttl_s
    assert all(connection.ttl(key) > longest_s for key in tombstones)  # in case the jobs finish at the last moment
    connection.delete(*tombstones)  # as if no worker had been there for a day
    for one in (job, judged):
        store.fail(one.id, "why")
    assert len(lifetimes_s()) == 7  # the other one has events, too
    assert all(0 < lifetime_s <= store.settings.job_ttl_s for lifetime_s in lifetimes_s())
    assert all(connection.ttl(key) > store.settings.job_ttl_s for key in tombstones)


def test_a_worker_asks_only_about_the_pictures_that_it_has_claimed(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    """A job may have ten thousands."""
    job, other = record(4), record(1)
    for one in job, other:
        store.create(one)
    claims = a.claim_new(5)
    asked = [claim.picture.key for claim in claims]
    assert store.unfinished([*asked, ("nobody", 0)]) == set(asked)
    store.commit(a.key, [done(claim) for claim in claims if claim.picture.index in (0, 2)])
    connection.config_resetstat()
    assert store.unfinished([(job.id, 3), (job.id, 2), (other.id, 0)]) == {(job.id, 3)}
    assert {"cmdstat_hkeys", "cmdstat_hgetall"}.isdisjoint(connection.info("commandstats"))
    store.cancel(job.id)
    assert store.unfinished(asked) == set()


def test_commit_returns_the_jobs_that_are_complete(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job, other = record(2), record(1)
    store.create(job)
    store.create(other)
    first, second, third = a.claim_new(5)
    assert store.commit(a.key, [done(first)]) == set()
    assert store.done_count(job.id) == 1
    assert store.commit(a.key, [done(second), done(third)]) == {job.id, other.id}
    assert [(one.id, len(verdicts)) for one, verdicts in store.open_verdicts([job.id, other.id])] == [
        (job.id, 2),
        (other.id, 1),
    ]
    assert connection.xlen(a.key) == 0
    assert connection.xpending(a.key, GROUP)["pending"] == 0


def test_a_job_of_one_picture_ends_as_it_is_stored(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job, larger = record(1), record(2)
    store.create(job)
    store.create(larger)
    claims = a.claim_new(5)
    store.begin(job.id, larger.id)
    results = {claim.picture.key: RESULT for claim in claims}
    assert store.commit(a.key, [done(claim) for claim in claims], results=results) == {larger.id}
    assert store.statuses([job.id, larger.id]) == {job.id: "finished", larger.id: "running"}
    assert connection.hgetall(keys.png(job.id)) == {b"0": b"png", keys.GRID.encode(): b"0"}
    assert connection.hget(keys.job(job.id), "result") == RESULT.write().encode()
    assert connection.lrange(store.queue.key, 0, -1) == [connection.hget(keys.job(larger.id), "rq")]
    assert [text(job_id) for job_id in connection.smembers(keys.OPEN)] == [larger.id]
    assert [fields for _, fields in connection.xrange(keys.ENDED)] == [{b"job": job.id.encode()}]
    expected = [{b"status": b"running"}, {b"status": b"finished", b"last_picture": b"0"}]
    assert [fields for _, fields in connection.xrange(keys.events(job.id))] == expected
    lifetimes = [connection.ttl(key(job.id)) for key in (keys.job, keys.events, keys.verdicts, keys.png)]
    assert all(0 < lifetime_s <= store.settings.job_ttl_s for lifetime_s in lifetimes)
    assert store.commit(a.key, [done(claims[0], b"second")], results=results) == set()
    assert store.pngs(job.id, [0]) == [b"png"]


def test_a_job_whose_only_picture_another_worker_stored_is_complete(store: JobStore, a: PictureStream) -> None:
    job = record(1)
    store.create(job)
    (claim,) = a.claim_new(5)
    store.commit(a.key, [done(claim)])
    assert store.commit(a.key, [done(claim)], results={claim.picture.key: RESULT}) == {job.id}


def test_pictures_stay_in_the_stream_if_they_cannot_be_stored(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job, broken = record(1), record(1)
    store.create(job)
    store.create(broken)
    claims = a.claim_new(5)
    connection.set(keys.verdicts(broken.id), "no hash")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        store.commit(a.key, [done(claim) for claim in claims])
    assert connection.xpending(a.key, GROUP)["pending"] == 2
    connection.delete(keys.verdicts(broken.id))
    assert store.commit(a.key, [done(claim) for claim in claims]) == {job.id, broken.id}
    assert connection.xlen(a.key) == 0


def test_the_first_of_two_commits_of_a_picture_is_kept(store: JobStore, a: PictureStream) -> None:
    job = record(1)
    store.create(job)
    (claim,) = a.claim_new(5)
    store.commit(a.key, [done(claim, b"first")])
    assert store.commit(a.key, [done(claim, b"second")]) == {job.id}
    assert store.pngs(job.id, [0]) == [b"first"]
    ((_, verdicts),) = store.open_verdicts([job.id])
    assert [verdict.index for verdict in verdicts] == [0]


def test_a_picture_has_one_event_and_none_after_the_end(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job, cancelled = record(1), record(1)
    store.create(job)
    store.create(cancelled)
    first, second = a.claim_new(5)
    store.cancel(cancelled.id)
    assert store.commit(a.key, [done(first), done(first), done(second)]) == {job.id}
    assert [fields for _, fields in connection.xrange(keys.events(job.id))] == [{b"picture": b"0"}]
    assert [fields for _, fields in connection.xrange(keys.events(cancelled.id))] == [{b"status": b"cancelled"}]
    assert not connection.exists(keys.png(cancelled.id))
    assert connection.xpending(a.key, GROUP)["pending"] == 0  # all of them left the stream


@pytest.mark.parametrize("state", [full, read_only])
def test_no_job_is_created_if_redis_refuses_writes(store: JobStore, connection: Redis, state: State) -> None:
    with state(connection), pytest.raises(ResponseError) as refused:
        store.create(record(1))
    assert refuses_writes(refused.value)
    assert list(connection.scan_iter()) == []


def test_a_full_redis_lets_the_owner_of_a_key_delete_a_job(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job = record(1, owner="alice")
    store.create(job)
    store.commit(a.key, [done(a.claim_new(1)[0])])
    store.finish({job.id: (RESULT, b"grid")})
    with full(connection):
        assert store.delete(job.id)
    (stored,) = connection.hvals(keys.stored_bytes("alice"))
    assert stored.split()[1] == b"0"


def test_a_full_redis_refuses_new_jobs_and_lets_open_ones_end(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    jobs = [record(1) for _ in range(4)]
    for job in jobs:
        store.create(job)
    claims = a.claim_new(5)
    with full(connection):
        with pytest.raises(ResponseError) as refused:
            store.create(record(1))
        assert is_full(refused.value)
        workers.announce(connection, "w", {}, lease_s=60)
        assert workers.is_alive(connection, "w")
        assert store.begin(jobs[0].id)
        assert store.commit(a.key, [done(claims[0])]) == {jobs[0].id}
        assert store.finish({jobs[0].id: (RESULT, b"grid")})
        assert store.fail(jobs[1].id, "why")
        assert store.cancel(jobs[2].id)
        assert store.commit(a.key, [done(claims[3])], results={claims[3].picture.key: RESULT}) == set()
        a.discard([claim.entry for claim in claims])
        assert connection.xlen(a.key) == 0
        assert list(store.statuses(job.id for job in jobs).values()) == [
            "finished", "failed", "cancelled", "finished",
        ]  # fmt: skip
