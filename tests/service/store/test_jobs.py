"""Jobs in Redis: what is created at once, which ways a status goes, and who gets which picture."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ExecAbortError, OutOfMemoryError, ResponseError
from rq.job import Job as RqJob
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from service.contract.records import FinishedPicture, JobRecord, JobResult, Scores, Verdict
from service.settings import Settings
from service.store.claims import GROUP, Claim, PictureStream
from service.store.idempotency import IdempotentRequest, KeyReused
from service.store.job_index import id_of
from service.store.jobs import SWEPT, JobStore, new_id
from service.store.keys import (
    OPEN,
    events_key,
    index_key,
    job_key,
    owner_jobs_key,
    pending_counts_key,
    png_key,
    tombstone_key,
    verdicts_key,
)
from shared.options import SamplingOptions, picture_seed

DIGEST = "d" * 64
RESULT = JobResult(repeats=[Scores(accuracy=1, exact_match=1, f1=1)], best=0)


def record(n: int = 2, *, repeats: int = 1, seed: int = 7, created_at: float | None = None) -> JobRecord:
    return JobRecord(
        id=new_id(),
        kind="generate",
        created_at=time.time() if created_at is None else created_at,
        model="toy",
        digest=DIGEST,
        labels=[["red cube"]] * n,
        seed=seed,
        repeats=repeats,
        columns=8,
        options=SamplingOptions(),
    )


def done(claim: Claim, png: bytes = b"png") -> FinishedPicture:
    picture = claim.picture
    verdict = Verdict(
        index=picture.index,
        labels=picture.labels,
        seed=picture.seed,
        accuracy=1.0,
        f1=1.0,
        exact=True,
        probabilities={"red cube": 1.0},
    )
    return FinishedPicture(claim.entry, picture, verdict, png)


@pytest.fixture
def store(connection: Redis, settings: Settings) -> JobStore:
    return JobStore(connection, settings)


@pytest.fixture
def a(connection: Redis, settings: Settings) -> PictureStream:
    return PictureStream(connection, settings, DIGEST, "a")


@pytest.fixture
def b(connection: Redis, settings: Settings) -> PictureStream:
    return PictureStream(connection, settings, DIGEST, "b")


def test_the_pictures_of_repeats_have_the_seeds_of_separate_requests() -> None:
    job = record(3, repeats=2, seed=40)
    assert [(p.index, p.seed) for p in job.pictures()] == [
        (r * 3 + i, picture_seed(40 + r, i)) for r in range(2) for i in range(3)
    ]


def test_create_writes_job_pictures_and_rq_job_in_one_transaction(store: JobStore, connection: Redis) -> None:
    job = record(3)
    with connection.monitor() as monitor:  # type: ignore[no-untyped-call]
        store.create(job)
        commands = []
        for command in monitor.listen():
            commands.append(command["command"].split()[0].upper())
            if commands[-1] == "EXEC":
                break
    assert commands.count("MULTI") == 1
    inside = commands[commands.index("MULTI") + 1 : commands.index("EXEC")]
    assert inside.count("RPUSH") == 3  # the pictures, the job's turn, RQ's queue
    assert "SADD" in inside
    assert not {"HSET", "RPUSH", "XADD"} & set(commands[: commands.index("MULTI")])
    assert store.record(job.id) == job
    assert store.statuses([job.id, "nobody"]) == {job.id: "queued", "nobody": None}
    assert connection.hgetall(pending_counts_key(DIGEST)) == {b"": b"3"}
    assert connection.llen(store.queue.key) == 1


@pytest.mark.parametrize("end", ["finish", "fail", "cancel"])
def test_a_terminal_state_is_never_left(store: JobStore, connection: Redis, end: str) -> None:
    job = record()
    store.create(job)
    assert store.begin(job.id)
    assert not store.begin(job.id)
    ends = {
        "finish": lambda: store.finish(job.id, RESULT, b"grid"),
        "fail": lambda: store.fail(job.id, "why"),
        "cancel": lambda: store.cancel(job.id),
    }
    assert ends.pop(end)()
    before = connection.hgetall(job_key(job.id))
    assert not store.begin(job.id)
    assert not any(other() for other in ends.values())
    assert not store.fail(job.id, "another reason")
    assert connection.hgetall(job_key(job.id)) == before
    assert not connection.sismember(OPEN, job.id)


def test_a_job_that_is_gone_cannot_be_moved(store: JobStore, connection: Redis) -> None:
    assert not store.begin("nobody")
    assert not store.fail("nobody", "why")
    assert not store.cancel("nobody")
    assert connection.exists(job_key("nobody")) == 0


def test_what_is_finished_expires_as_a_whole(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job = record(1)
    store.create(job)
    store.commit(a.key, GROUP, [done(claim) for claim in a.claim_new(5)])
    store.finish(job.id, RESULT, b"grid")
    keys = [job_key(job.id), verdicts_key(job.id), png_key(job.id), events_key(job.id)]
    assert all(0 < connection.ttl(key) <= store.settings.job_ttl_s for key in keys)
    assert 0 <= store.settings.job_ttl_s + store.settings.remembered_s - connection.ttl(tombstone_key(job.id)) < 60


def test_a_job_without_an_end_is_remembered_for_longer_than_it_is_kept(store: JobStore, connection: Redis) -> None:
    job = record(1)
    store.create(job)
    store.begin(job.id)
    assert 0 <= store.open_ttl_s + store.settings.remembered_s - connection.ttl(tombstone_key(job.id)) < 60


def test_an_open_job_outlives_its_time_and_nothing_of_it_is_kept_for_ever(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    job, sent = record(2), record(1)
    store.create(job)
    store.create(sent, sent=[b"png"])

    def lifetimes() -> list[int]:
        return [connection.ttl(key) for one in (job, sent) for key in connection.scan_iter(f"{job_key(one.id)}*")]

    assert len(lifetimes()) == 5
    assert min(lifetimes()) > store.lifetime_s
    store.begin(job.id)
    store.commit(a.key, GROUP, [done(claim) for claim in a.claim_new(1)])
    assert len(lifetimes()) == 8
    assert min(lifetimes()) > store.lifetime_s
    for one in (job, sent):
        store.fail(one.id, "why")
    assert all(0 < lifetime_s <= store.settings.job_ttl_s for lifetime_s in lifetimes())


def test_commit_says_when_a_job_has_all_of_its_pictures(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job, other = record(2), record(1)
    store.create(job)
    store.create(other)
    first, second, third = a.claim_new(5)
    assert store.commit(a.key, GROUP, [done(first)]) == set()
    assert store.done_indices(job.id) == {0}
    assert store.commit(a.key, GROUP, [done(second), done(third)]) == {job.id, other.id}
    assert store.done_indices(job.id) == {0, 1}
    assert [(one.id, len(verdicts)) for one, verdicts in store.open_verdicts([job.id, other.id])] == [
        (job.id, 2),
        (other.id, 1),
    ]
    assert connection.xlen(a.key) == 0
    assert connection.xpending(a.key, GROUP)["pending"] == 0


def test_of_two_that_made_a_picture_the_first_is_kept(store: JobStore, a: PictureStream) -> None:
    job = record(1)
    store.create(job)
    (claim,) = a.claim_new(5)
    store.commit(a.key, GROUP, [done(claim, b"first")])
    assert store.commit(a.key, GROUP, [done(claim, b"second")]) == {job.id}
    assert store.pngs(job.id, [0]) == [b"first"]
    ((_, verdicts),) = store.open_verdicts([job.id])
    assert [verdict.index for verdict in verdicts] == [0]


def test_a_picture_is_claimed_once_and_in_order(store: JobStore, a: PictureStream, b: PictureStream) -> None:
    store.create(record(3))
    assert [claim.picture.index for claim in a.claim_new(2)] == [0, 1]
    assert [claim.picture.index for claim in b.claim_new(5)] == [2]
    assert a.claim_new(5) == []


def test_a_lease_that_is_renewed_is_kept_and_one_that_is_not_goes_to_another(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    quick = settings.model_copy(update={"lease_s": 0.2})
    a, b = (PictureStream(connection, quick, DIGEST, name) for name in "ab")
    store.create(record(2))
    kept, lost = a.claim_new(5)
    for _ in range(4):
        time.sleep(0.08)
        a.renew([kept.entry])
    taken, hopeless = b.claim_stale(5, may_be_alone=True)
    assert (taken, hopeless) == ([lost], [])
    assert connection.xpending_range(a.key, GROUP, "-", "+", 5)[0]["times_delivered"] == 1


def test_of_workers_that_ended_none_is_kept_unless_it_has_pictures(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    patient = settings.model_copy(update={"lease_s": 0.05})
    first, idle, busy = (PictureStream(connection, patient, DIGEST, name) for name in ("first", "idle", "busy"))

    def names() -> list[bytes]:
        return sorted(one["name"] for one in connection.xinfo_consumers(first.key, GROUP))

    store.create(record(4))
    busy.claim_new(1)
    for done_with in (first, idle):
        done_with.discard([claim.entry for claim in done_with.claim_new(1)])
    assert names() == [b"busy", b"first", b"idle"]
    time.sleep(0.08)
    first.claim_stale(0, may_be_alone=False)
    assert names() == [b"busy"]
    assert len(first.claim_new(1)) == 1
    assert names() == [b"busy", b"first"]
    assert connection.xpending(first.key, GROUP)["pending"] == 2


def test_what_is_given_back_is_taken_at_once_and_is_as_new(store: JobStore, a: PictureStream, b: PictureStream) -> None:
    store.create(record(1))
    for mine, other in ((a, b), (b, a)) * 3:
        claims = mine.claim_new(1) or mine.claim_stale(1, may_be_alone=True)[0]
        mine.release([claim.entry for claim in claims])
        other._looked_at = 0.0
    assert [claim.alone for claim in a.claim_stale(1, may_be_alone=True)[0]] == [False]


def test_a_picture_in_dying_workers_is_made_alone_at_last_and_then_given_up(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    quick = settings.model_copy(update={"lease_s": 0.05, "max_deliveries": 3})
    a = PictureStream(connection, quick, DIGEST, "a")
    job = record(2)
    store.create(job)
    a.claim_new(5)
    seen = []
    for _ in range(3):
        time.sleep(0.08)
        seen.append(a.claim_stale(5, may_be_alone=True))
    assert [[(claim.picture.index, claim.alone) for claim in claims] for claims, _ in seen] == [
        [(0, False), (1, False)],
        [(0, True)],
        [(1, True)],
    ]
    assert [[claim.picture.index for claim in hopeless] for _, hopeless in seen] == [[], [], [0]]


def test_suspects_are_looked_for_as_soon_as_the_last_is_made(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    quick = settings.model_copy(update={"lease_s": 0.05, "max_deliveries": 2})
    a = PictureStream(connection, quick, DIGEST, "a")
    store.create(record(2))
    a.claim_new(5)
    time.sleep(0.08)
    assert [claim.picture.index for claim in a.claim_stale(5, may_be_alone=True)[0]] == [0]
    a._looked_at = math.inf  # it has looked just now
    assert a.claim_stale(0, may_be_alone=False) == ([], [])
    assert [claim.picture.index for claim in a.claim_stale(5, may_be_alone=True)[0]] == [1]
    a._looked_at = math.inf
    time.sleep(0.08)
    assert a.claim_stale(5, may_be_alone=True) == ([], [])


def test_a_stream_survives_that_redis_is_emptied(connection: Redis, store: JobStore, a: PictureStream) -> None:
    connection.flushall()
    assert a.claim_stale(1, may_be_alone=True) == ([], [])  # as workers do, before they ask for new ones
    assert a.claim_new(1) == []
    store.create(record(1))
    assert len(a.claim_new(1)) == 1


def test_an_entry_that_is_no_picture_is_thrown_away(store: JobStore, a: PictureStream, connection: Redis) -> None:
    connection.xadd(a.key, {"picture": "{}"})
    connection.xadd(a.key, {"foreign": "x"})
    store.create(record(1))
    assert len(a.claim_new(5)) == 1
    assert connection.xlen(a.key) == 1


def test_of_requests_with_one_key_that_come_at_once_one_makes_the_job(store: JobStore, connection: Redis) -> None:
    asked = IdempotentRequest("", "key", "request")
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: store.create(record(), asked), range(8)))
    (job_id,) = ids
    assert connection.ttl(asked.redis_key) == pytest.approx(connection.ttl(job_key(job_id)), abs=1)
    assert connection.scard(OPEN) == 1
    assert connection.hgetall(pending_counts_key(DIGEST)) == {b"": b"2"}
    with pytest.raises(KeyReused):
        store.create(record(), IdempotentRequest("", "key", "another request"))
    assert connection.scard(OPEN) == 1


def test_the_index_forgets_what_is_older_than_any_job(store: JobStore, connection: Redis) -> None:
    lifetime_s = store.settings.job_ttl_s + store.settings.job_timeout_s
    old, young = record(created_at=time.time() - lifetime_s - 2), record(created_at=time.time() - lifetime_s + 60)
    for job in (old, young, record()):
        store.create(job)
    members = [raw.decode() for raw in connection.zrange(index_key(""), 0, -1)]
    assert [id_of(member) for member in members][:1] == [young.id]
    assert len(members) == 2
    assert 0 < connection.ttl(index_key("")) <= lifetime_s


def lose(store: JobStore, connection: Redis, job: JobRecord, how: str) -> None:
    rq_id = connection.hget(job_key(job.id), "rq")
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
def test_a_job_that_rq_lost_is_queued_again_once(store: JobStore, connection: Redis, how: str) -> None:
    job = record()
    store.create(job)
    lose(store, connection, job, how)
    connection.delete(store.queue.key)
    store.sweep()
    assert connection.llen(store.queue.key) == 0  # it may only just be on its way
    store.sweep()
    assert connection.llen(store.queue.key) == 1
    store.sweep()
    store.sweep()
    assert connection.llen(store.queue.key) == 1


def test_sweeps_come_to_every_job_and_ask_little_at_a_time(store: JobStore, connection: Redis) -> None:
    jobs = [record() for _ in range(2 * SWEPT)]
    for job in jobs:
        store.create(job)
    lose(store, connection, jobs[7], "failed")
    connection.lrem(store.queue.key, 1, connection.hget(job_key(jobs[7].id), "rq"))  # type: ignore[arg-type]
    before = connection.info("stats")["total_commands_processed"]
    store.sweep()
    assert connection.info("stats")["total_commands_processed"] - before < 2 * SWEPT
    for _ in range(10):
        store.sweep()
    assert connection.llen(store.queue.key) == 2 * SWEPT


def test_a_sweep_leaves_alone_what_is_well(store: JobStore, connection: Redis, alive: JobStore) -> None:
    taken, waiting, ended = (record() for _ in range(3))
    for job in (taken, waiting, ended):
        store.create(job)
    lose(store, connection, taken, "started by a worker")  # which lives
    store.fail(ended.id, "why")
    connection.sadd(OPEN, ended.id, "nobody")
    for _ in range(3):
        store.sweep()
    assert connection.smembers(OPEN) == {taken.id.encode(), waiting.id.encode()}
    assert connection.lrange(store.queue.key, 0, -1) == [connection.hget(job_key(waiting.id), "rq")]
    assert store.statuses([waiting.id]) == {waiting.id: "queued"}


def set_overdue(connection: Redis, job: JobRecord) -> None:
    connection.hset(job_key(job.id), "overdue_at", connection.time()[0])


def test_a_job_that_takes_too_long_fails_by_the_clock_of_redis_alone(store: JobStore, connection: Redis) -> None:
    day_s = 86400
    late, from_the_past, from_the_future = (
        record(),
        record(created_at=time.time() - day_s),
        record(created_at=day_s * 1e6),
    )
    for job in (late, from_the_past, from_the_future):
        store.create(job)
    store.sweep()
    assert store.is_open(late.id)
    set_overdue(connection, late)
    store.sweep()
    assert store.statuses([late.id]) == {late.id: "failed"}
    assert store.is_open(from_the_past.id)
    assert store.is_open(from_the_future.id)


def test_open_jobs_keep_their_time_where_another_is_set(connection: Redis, settings: Settings, store: JobStore) -> None:
    job = record()
    store.create(job)
    JobStore(connection, settings.model_copy(update={"job_ttl_s": 86400, "job_timeout_s": 1})).sweep()
    assert store.is_open(job.id)


def test_a_job_of_before_there_were_deadlines_is_given_one(connection: Redis, store: JobStore) -> None:
    job = record()
    store.create(job)
    connection.hdel(job_key(job.id), "overdue_at")
    connection.expire(job_key(job.id), 10)
    store.sweep()
    assert store.is_open(job.id)
    assert connection.ttl(job_key(job.id)) > store.lifetime_s
    left_s = int(connection.hget(job_key(job.id), "overdue_at") or 0) - connection.time()[0]
    assert 0 <= store.settings.job_timeout_s - left_s < 60
    set_overdue(connection, job)
    store.sweep()
    assert store.statuses([job.id]) == {job.id: "failed"}


def test_pictures_of_an_open_job_that_is_gone_no_longer_wait(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    gone, other = record(3), record(2)
    for job in (gone, other):
        store.create(job)
    connection.delete(job_key(gone.id))
    store.sweep()
    assert connection.smembers(OPEN) == {other.id.encode()}
    assert connection.hgetall(pending_counts_key(DIGEST)) == {b"": b"2"}
    assert connection.lrange(owner_jobs_key(DIGEST, ""), 0, -1) == [other.id.encode()]
    assert list(connection.scan_iter(f"{job_key(gone.id)}*")) == []
    assert [claim.picture.job for claim in a.claim_new(5)] == [other.id] * 2


def test_a_picture_is_told_once_and_none_after_the_end(store: JobStore, a: PictureStream, connection: Redis) -> None:
    job, cancelled = record(1), record(1)
    store.create(job)
    store.create(cancelled)
    first, second = a.claim_new(5)
    store.cancel(cancelled.id)
    assert store.commit(a.key, GROUP, [done(first), done(first), done(second)]) == {job.id}
    assert [fields for _, fields in connection.xrange(events_key(job.id))] == [{b"picture": b"0"}]
    assert [fields for _, fields in connection.xrange(events_key(cancelled.id))] == [{b"status": b"cancelled"}]
    assert not connection.exists(png_key(cancelled.id))
    assert connection.xpending(a.key, GROUP)["pending"] == 0  # off the stream they are all the same


@pytest.fixture
def full(connection: Redis) -> Iterator[Callable[[], object]]:
    """Fills Redis, as far as it can tell."""
    yield lambda: connection.config_set("maxmemory", 1)
    connection.config_set("maxmemory", 0)


@pytest.fixture
def replica(connection: Redis) -> Iterator[Callable[[], object]]:
    """Makes Redis a replica, as a failover does, here of nobody."""
    yield lambda: connection.replicaof("127.0.0.1", 1)
    connection.replicaof("NO", "ONE")


@pytest.mark.parametrize(("state", "error"), [("full", OutOfMemoryError), ("replica", ExecAbortError)])
def test_a_redis_that_takes_no_writes_any_more_within_a_transaction_takes_no_job(
    store: JobStore,
    connection: Redis,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    error: type[ResponseError],
) -> None:
    """Each command is taken, and only their end, EXEC, is refused: another error of redis-py's than a full Redis's."""
    become: Callable[[], object] = request.getfixturevalue(state)

    def one_by_one(pipe: Pipeline) -> None:
        wire = pipe.connection_pool.get_connection()
        for arguments in [("MULTI",), *(command[0] for command in pipe.command_stack)]:
            wire.send_command(*arguments)
            wire.read_response()
        become()
        wire.send_command("EXEC")
        wire.read_response()

    monkeypatch.setattr(Pipeline, "execute", one_by_one)
    with pytest.raises(error, match="Transaction discarded"):
        store.create(record(1))
    assert connection.scard(OPEN) == 0


def test_a_full_redis_takes_no_job_and_lets_those_that_it_has_come_to_their_end(
    store: JobStore, a: PictureStream, connection: Redis, full: Callable[[], object]
) -> None:
    jobs = [record(1) for _ in range(3)]
    for job in jobs:
        store.create(job)
    claims = a.claim_new(5)
    full()
    with pytest.raises(OutOfMemoryError):
        store.create(record(1))
    store.say_alive("w", {})
    assert store.is_alive("w")
    assert store.begin(jobs[0].id)
    assert store.commit(a.key, GROUP, [done(claims[0])]) == {jobs[0].id}
    assert store.finish(jobs[0].id, RESULT, b"grid")
    assert store.fail(jobs[1].id, "why")
    assert store.cancel(jobs[2].id)
    a.discard([claim.entry for claim in claims])
    assert connection.xlen(a.key) == 0
    assert list(store.statuses(job.id for job in jobs).values()) == ["finished", "failed", "cancelled"]


def test_a_worker_is_alive_for_a_lease(connection: Redis, settings: Settings) -> None:
    store = JobStore(connection, settings.model_copy(update={"lease_s": 0.1}))
    store.say_alive("w", {})
    assert store.is_alive("w")
    time.sleep(0.15)
    assert not store.is_alive("w")
