"""Claims: each picture goes to one worker, leases expire, and pictures that kill workers are given up."""

import math
import time

import pytest
from redis import Redis

from service.settings import Settings
from service.store import claims, keys
from service.store.claims import GROUP, PictureStream
from service.store.connection import text
from service.store.jobs import JobStore
from tests.service.store.ageing import MINUTE_S, age
from tests.service.store.helpers import DIGEST, RESULT, add_job, commands, commit_all, full, record


def two_workers(connection: Redis, settings: Settings, lease_s: float) -> tuple[PictureStream, PictureStream]:
    """Return two workers' views of one stream."""
    quick = settings.model_copy(update={"lease_s": lease_s})
    return PictureStream(connection, quick, DIGEST, "a"), PictureStream(connection, quick, DIGEST, "b")


def test_a_picture_is_claimed_once_and_in_order(store: JobStore, a: PictureStream, b: PictureStream) -> None:
    add_job(store, record(3))
    assert [claim.picture.index for claim in a.claim_new(2)] == [0, 1]
    assert [claim.picture.index for claim in b.claim_new(5)] == [2]
    assert a.claim_new(5) == []


def test_a_renewed_lease_is_kept_and_an_expired_one_is_taken_over(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    a, b = two_workers(connection, settings, lease_s=50)
    add_job(store, record(2))
    kept, lost = a.claim_new(5)
    for _ in range(4):
        age(connection, MINUTE_S)
        a.renew([kept.entry])
    taken, hopeless = b.claim_stale(5, may_be_alone=True)
    assert (taken, hopeless) == ([lost], [])
    assert connection.xpending_range(a.key, GROUP, "-", "+", 5)[0]["times_delivered"] == 1


def test_leases_of_a_stream_that_redis_has_lost_are_renewed_and_released_in_vain(
    connection: Redis, store: JobStore, a: PictureStream
) -> None:
    """A heartbeat goes on with the leases of other models."""
    add_job(store, record(2))
    held = [claim.entry for claim in a.claim_new(5)]
    connection.flushall()
    a.renew(held)
    a.release(held)
    add_job(store, record(1))
    assert len(a.claim_new(5)) == 1


def test_new_pictures_do_not_take_the_places_of_those_with_expired_leases(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(3))
    a.claim_new(5)
    age(connection, MINUTE_S)
    assert b.claim_stale(0, may_be_alone=False) == ([], [])  # its batch is full
    taken = [[claim.picture.index for claim in b.claim_stale(room, may_be_alone=False)[0]] for room in (0, 2, 2, 2)]
    assert taken == [[], [0, 1], [2], []]  # at once, not a quarter of a lease later


def test_idle_consumers_are_dropped_unless_they_have_pictures(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    patient = settings.model_copy(update={"lease_s": 0.05})
    first, idle, busy = (PictureStream(connection, patient, DIGEST, name) for name in ("first", "idle", "busy"))

    def names() -> list[bytes]:
        return sorted(one["name"] for one in connection.xinfo_consumers(first.key, GROUP))

    add_job(store, record(4))
    busy.claim_new(1)
    for done_with in (first, idle):
        done_with.discard([claim.entry for claim in done_with.claim_new(1)])
    assert names() == [b"busy", b"first", b"idle"]
    two_workers(connection, settings, lease_s=3600)[0].claim_stale(0, may_be_alone=False)
    assert names() == [b"busy", b"first", b"idle"]  # none has been idle for so long
    time.sleep(0.08)
    first.claim_stale(0, may_be_alone=False)
    assert names() == [b"busy"]
    assert len(first.claim_new(1)) == 1
    assert names() == [b"busy", b"first"]
    assert connection.xpending(first.key, GROUP)["pending"] == 2


def test_a_released_picture_is_claimed_at_once_and_counts_as_new(
    store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(1))
    for mine, other in ((a, b), (b, a)) * 3:
        claims = mine.claim_new(1) or mine.claim_stale(1, may_be_alone=True)[0]
        mine.release([claim.entry for claim in claims])
        other._looked_at = 0.0
    assert [claim.alone for claim in a.claim_stale(1, may_be_alone=True)[0]] == [False]


def test_a_picture_whose_workers_die_is_sampled_alone_and_then_given_up(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    quick = settings.model_copy(update={"lease_s": 0.05, "max_deliveries": 4})
    a = PictureStream(connection, quick, DIGEST, "a")
    job = record(2)
    add_job(store, job)
    a.claim_new(5)
    seen = []
    for _ in range(4):
        time.sleep(0.08)
        seen.append(a.claim_stale(5, may_be_alone=True))
    assert [[(claim.picture.index, claim.alone) for claim in claims] for claims, _ in seen] == [
        [(0, False), (1, False)],
        [(0, True)],
        [(0, True)],  # its last try
        [(1, True)],
    ]
    reason = "workers died 4 times while sampling picture 0"
    assert [[(one.job, one.reason) for one in hopeless] for _, hopeless in seen] == [[]] * 3 + [[(job.id, reason)]]


def test_a_worker_that_samples_others_leaves_a_suspect_alone(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    """It would wait there for its turn, and the death of that worker would count against it."""
    quick = settings.model_copy(update={"lease_s": 0.05})
    a = PictureStream(connection, quick, DIGEST, "a")
    add_job(store, record(2))
    entries = [claim.entry for claim in a.claim_new(5)]
    connection.xclaim(a.key, GROUP, "dead", 0, entries[:1], idle=1000, retrycount=2, justid=True)
    time.sleep(0.08)
    assert a.claim_stale(5, may_be_alone=False) == ([], [])
    assert a.suspects == 1
    assert [one["times_delivered"] for one in connection.xpending_range(a.key, GROUP, "-", "+", 5)] == [2, 1]


def test_one_worker_samples_suspects_and_the_others_go_on(
    connection: Redis, settings: Settings, store: JobStore
) -> None:
    a, b = two_workers(connection, settings, lease_s=50)
    add_job(store, record(6))
    entries = [claim.entry for claim in a.claim_new(6)]
    connection.xclaim(a.key, GROUP, "dead", 0, entries[:5], idle=60_000, retrycount=2, justid=True)
    connection.xclaim(a.key, GROUP, "dead", 0, entries[5:], idle=60_000, retrycount=1, justid=True)
    assert [claim.picture.index for claim in a.claim_stale(5, may_be_alone=True)[0]] == [0]
    assert [(one.picture.index, one.alone) for one in b.claim_stale(5, may_be_alone=True)[0]] == [(5, False)]
    assert (a.suspects, b.suspects) == (4, 0)
    connection.pexpire(keys.suspects_keeper(DIGEST), 1000)
    a._looked_at = -math.inf
    a.claim_stale(0, may_be_alone=False)
    assert connection.pttl(keys.suspects_keeper(DIGEST)) > 1000  # it remains the one as long as it asks
    age(connection, MINUTE_S)  # the first one is dead
    b._looked_at = -math.inf
    assert [claim.picture.index for claim in b.claim_stale(5, may_be_alone=True)[0]] == [0]


def test_the_next_suspect_is_claimed_without_delay(connection: Redis, settings: Settings, store: JobStore) -> None:
    quick = settings.model_copy(update={"lease_s": 0.05, "max_deliveries": 2})
    a = PictureStream(connection, quick, DIGEST, "a")
    add_job(store, record(2))
    a.claim_new(5)
    time.sleep(0.08)
    assert [claim.picture.index for claim in a.claim_stale(5, may_be_alone=True)[0]] == [0]
    a._looked_at = math.inf  # as if it had looked just now
    assert a.claim_stale(0, may_be_alone=False) == ([], [])
    assert [claim.picture.index for claim in a.claim_stale(5, may_be_alone=True)[0]] == [1]
    a._looked_at = math.inf
    time.sleep(0.08)
    assert a.claim_stale(5, may_be_alone=True) == ([], [])


def test_a_stream_survives_a_flush_of_redis(connection: Redis, store: JobStore, a: PictureStream) -> None:
    connection.flushall()
    assert a.claim_stale(1, may_be_alone=True) == ([], [])  # workers call this before claim_new
    assert a.claim_new(1) == []
    add_job(store, record(1))
    assert len(a.claim_new(1)) == 1


def test_an_entry_that_is_not_a_picture_is_discarded(store: JobStore, a: PictureStream, connection: Redis) -> None:
    connection.xadd(a.key, {"picture": "{}"})
    connection.xadd(a.key, {"foreign": "x"})
    add_job(store, record(1))
    assert len(a.claim_new(5)) == 1
    assert connection.xlen(a.key) == 1


def test_an_entry_is_discarded_by_one_command_also_while_redis_is_full(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    """A process that dies between two would leave an entry that nobody claims and that counts as open for ever."""
    add_job(store, record(2))
    entries = [claim.entry for claim in a.claim_new(2)]
    with full(connection):
        assert commands(connection, lambda: a.discard(entries)) == ["FCALL"]
    assert connection.xlen(a.key) == connection.xpending(a.key, GROUP)["pending"] == 0


@pytest.mark.parametrize("exists", [False, True])
def test_a_worker_begins_to_claim_while_redis_is_full(
    settings: Settings, store: JobStore, connection: Redis, exists: bool
) -> None:
    """Only work makes room; so a worker must not wait for it to load a model."""
    add_job(store, record(2))
    if exists:
        PictureStream(connection, settings, DIGEST, "former")
    with full(connection):
        assert len(PictureStream(connection, settings, DIGEST, "a").claim_new(2)) == 2


def test_suspects_do_not_hold_up_the_other_pictures_while_redis_is_full(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(2))
    suspect, _ = a.claim_new(2)
    connection.xclaim(a.key, GROUP, a.consumer, 0, [suspect.entry], retrycount=claims.IN_BATCHES)
    age(connection, MINUTE_S)
    with full(connection):
        taken, hopeless = b.claim_stale(5, may_be_alone=True)
    assert ([claim.picture.index for claim in taken], hopeless) == ([1], [])
    assert [claim.picture.index for claim in a.claim_stale(5, may_be_alone=True)[0]] == [0]


def of_a_newer_version(connection: Redis, stream: PictureStream, job: str) -> str:
    """Add an entry with an option that this version does not know, and return its id."""
    entry: bytes = connection.xadd(stream.key, {"picture": f'{{"job": "{job}", "glow": 0.5}}', "asked_at": "1"})
    return entry.decode()


def test_an_unreadable_picture_is_left_to_other_workers_at_once(
    store: JobStore, a: PictureStream, b: PictureStream, connection: Redis
) -> None:
    entry = of_a_newer_version(connection, a, "j")
    add_job(store, record(1))
    assert [claim.picture.index for claim in a.claim_new(5)] == [0]
    a._looked_at = 0.0
    assert a.claim_stale(5, may_be_alone=True) == ([], [])  # it does not try again
    (pending,) = connection.xpending_range(b.key, GROUP, entry, entry, 1, idle=int(a.settings.lease_s * 1000))
    assert pending["times_delivered"] == 0  # which counts no death


def test_an_unreadable_picture_that_nobody_takes_fails_its_job(
    a: PictureStream, b: PictureStream, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = of_a_newer_version(connection, a, "j")
    a.claim_new(5)
    monkeypatch.setattr(claims, "UNREADABLE_S", 0.0)
    a._looked_at = 0.0
    (hopeless,) = a.claim_stale(5, may_be_alone=True)[1]
    assert (hopeless.entry, hopeless.job) == (entry, "j")
    assert "another version" in hopeless.reason


def test_many_unreadable_pictures_do_not_hide_the_others(
    store: JobStore, a: PictureStream, b: PictureStream, connection: Redis
) -> None:
    for _ in range(100):  # as many as are looked at
        of_a_newer_version(connection, a, "j")
    add_job(store, record(1))
    a.claim_new(100)
    b.claim_new(1)
    age(connection, MINUTE_S)
    assert [claim.picture.index for claim in a.claim_stale(5, may_be_alone=True)[0]] == [0]


def test_an_unreadable_picture_that_another_worker_took_is_forgotten(
    a: PictureStream, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = of_a_newer_version(connection, a, "j")
    a.claim_new(5)
    connection.xclaim(a.key, GROUP, "newer", 0, [entry])
    monkeypatch.setattr(claims, "UNREADABLE_S", 0.0)
    a._looked_at = 0.0
    assert a.claim_stale(5, may_be_alone=True) == ([], [])


def test_the_pictures_of_a_job_that_ends_early_leave_the_stream(
    store: JobStore, a: PictureStream, b: PictureStream, connection: Redis
) -> None:
    """Those of a worker that died, too: perhaps no other one has the model, and they would count as open for ever."""
    cancelled, other = record(2), record(2)
    add_job(store, cancelled)
    add_job(store, other)
    held = a.claim_new(3)
    store.cancel(cancelled.id)
    left = [claim.entry for claim in held if claim.job == other.id]
    assert [text(entry) for entry, _ in connection.xrange(a.key)] == left
    assert [text(one["message_id"]) for one in connection.xpending_range(a.key, GROUP, "-", "+", 9)] == left
    a.renew([claim.entry for claim in held])  # it has not noticed yet
    a.release([claim.entry for claim in held])
    assert [claim.entry for claim in b.claim_stale(9, may_be_alone=False)[0]] == left
    assert [claim.picture.key for claim in b.claim_new(9)] == [(other.id, 1)]


def test_a_grid_is_leased_to_its_worker_until_it_dies_and_then_to_another_one(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    jobs = [record(1) for _ in range(2)]
    for job in jobs:
        add_job(store, job)
    grids = commit_all(store, a)
    assert [(claim.job, claim.picture) for claim in grids] == [(job.id, None) for job in jobs]
    age(connection, MINUTE_S)
    a.renew([grids[0].entry])
    assert b.claim_stale(5, may_be_alone=True) == ([grids[1]], [])
    store.cancel(jobs[0].id)
    assert [text(entry) for entry, _ in connection.xrange(a.key)] == [grids[1].entry]  # the other one is gone
    assert store.finish(b, [(claim, RESULT) for claim in grids]) == {jobs[1].id}
    assert connection.xlen(a.key) == connection.xpending(a.key, GROUP)["pending"] == 0


def test_a_grid_whose_workers_die_is_given_up(connection: Redis, store: JobStore, a: PictureStream) -> None:
    job = record(2)
    add_job(store, job)
    (grid,) = commit_all(store, a)
    most = a.settings.max_deliveries
    connection.xclaim(a.key, GROUP, "dead", 0, [grid.entry], idle=60_000, retrycount=most, justid=True)
    assert a.claim_stale(5, may_be_alone=True) == (
        [], [claims.Hopeless(grid.entry, job.id, f"workers died {most} times while composing the grid")]
    )  # fmt: skip
