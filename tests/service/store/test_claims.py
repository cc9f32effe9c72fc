"""Claims: owners take turns, leases expire, and pictures that kill workers are given up."""

import time
from collections.abc import Sequence

import pytest
from redis import Redis

from service.contract.records import JobRecord, JobResult
from service.settings import Settings
from service.store import claims, keys
from service.store.claims import GROUP, Claim, PictureStream
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.registry import resolve
from tests.service.processes import until
from tests.service.store.ageing import MINUTE_S, age
from tests.service.store.helpers import DIGEST, add_job, full, record


def test_new_pictures_do_not_take_the_places_of_those_with_expired_leases(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(3))
    a.claim_new(5)
    age(connection, MINUTE_S)
    assert b.claim_stale(0, may_be_alone=False) == ([], [])  # its batch is full
    taken = [[claim.picture.index for claim in b.claim_stale(room, may_be_alone=False)[0]] for room in (0, 2, 2, 2)]
    assert taken == [[], [0, 1], [2], []]  # at once, not a quarter of a lease later


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


def of_dead_worker(connection: Redis, stream: PictureStream, entries: list[str], deliveries: int) -> None:
    connection.xclaim(stream.key, GROUP, "dead", 0, entries, idle=60_000, retrycount=deliveries, justid=True)


def test_a_worker_that_samples_others_leaves_a_suspect_alone(
    connection: Redis, store: JobStore, a: PictureStream
) -> None:
    """It would wait there for its turn, and the death of that worker would count against it."""
    add_job(store, record(2))
    suspect, _ = a.claim_new(5)
    of_dead_worker(connection, a, [suspect.entry], deliveries=2)
    assert a.claim_stale(5, may_be_alone=False) == ([], [])
    assert a.suspects == 1
    assert [one["times_delivered"] for one in connection.xpending_range(a.key, GROUP, "-", "+", 5)] == [2, 1]


def test_one_worker_samples_suspects_and_the_others_go_on(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(6))
    entries = [claim.entry for claim in a.claim_new(6)]
    of_dead_worker(connection, a, entries[:5], deliveries=2)
    of_dead_worker(connection, a, entries[5:], deliveries=1)
    assert [claim.picture.index for claim in a.claim_stale(5, may_be_alone=True)[0]] == [0]
    assert [(one.picture.index, one.alone) for one in b.claim_stale(5, may_be_alone=True)[0]] == [(5, False)]
    assert (a.suspects, b.suspects) == (4, 0)
    connection.pexpire(keys.suspects_keeper(DIGEST), 1000)
    a.claim_stale(0, may_be_alone=False)
    assert connection.pttl(keys.suspects_keeper(DIGEST)) > 1000  # it remains the one as long as it asks


def test_consumers_that_are_idle_for_a_lease_are_dropped_when_a_worker_opens_the_stream(
    connection: Redis, settings: Settings, a: PictureStream
) -> None:
    connection.xgroup_createconsumer(a.key, GROUP, "idle")
    for lease_s, consumers in ((3600.0, 1), (0.01, 0)):
        time.sleep(0.02)
        PictureStream(connection, settings.model_copy(update={"lease_s": lease_s}), DIGEST, "new")
        assert len(connection.xinfo_consumers(a.key, GROUP)) == consumers


def test_a_stream_that_redis_has_lost_is_made_anew(connection: Redis, store: JobStore, a: PictureStream) -> None:
    """A heartbeat goes on with the leases of other models."""
    add_job(store, record(2))
    held = [claim.entry for claim in a.claim_new(5)]
    connection.flushall()
    a.renew(held)
    a.release(held)
    assert a.claim_stale(1, may_be_alone=True) == ([], [])  # workers call this before claim_new
    add_job(store, record(1))
    assert len(a.claim_new(5)) == 1


def test_an_unreadable_picture_is_left_to_other_workers_until_it_fails_its_job(
    store: JobStore, a: PictureStream, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = of_a_newer_version(connection, a, "j")
    add_job(store, record(1))
    assert [claim.picture.index for claim in a.claim_new(5)] == [0]
    assert a.claim_stale(5, may_be_alone=True) == ([], [])  # it does not try again
    (pending,) = connection.xpending_range(a.key, GROUP, entry, entry, 1, idle=int(a.settings.lease_s * 1000))
    assert pending["times_delivered"] == 0  # which counts no death
    monkeypatch.setattr(claims, "UNREADABLE_S", 0.0)
    (hopeless,) = a.claim_stale(5, may_be_alone=True)[1]
    assert (hopeless.entry, hopeless.job) == (entry, "j")
    assert "another version" in hopeless.reason


def created(store: JobStore, *jobs: JobRecord) -> dict[str, str]:
    """Create jobs and return a letter for each id."""
    for job in jobs:
        add_job(store, job)
    return {job.id: letter for job, letter in zip(jobs, "ABCDEFGH", strict=False)}


def claimed(a: PictureStream, names: dict[str, str], room: int) -> str:
    return " ".join(f"{names[claim.job]}{claim.picture.index}" for claim in a.claim_new(room))


def test_jobs_take_turns_however_the_claims_are_cut(store: JobStore, a: PictureStream) -> None:
    names = created(store, record(5), record(1), record(3))
    assert claimed(a, names, 4) == "A0 B0 C0 A1"
    assert claimed(a, names, 1) == "C1"
    assert claimed(a, names, 9) == "A2 C2 A3 A4"
    assert claimed(a, names, 9) == ""


def test_owners_take_turns_however_many_jobs_each_has(store: JobStore, a: PictureStream) -> None:
    names = created(store, *(record(2, "alice") for _ in range(4)), record(3, "bob"))
    assert claimed(a, names, 3) == "A0 E0 B0"
    assert claimed(a, names, 4) == "E1 C0 E2 D0"
    assert claimed(a, names, 9) == "A1 B1 C1 D1"


def test_frequent_requests_do_not_come_first_every_time(store: JobStore, a: PictureStream) -> None:
    names = created(store, record(4, "alice"))
    order = ""
    for _ in range(3):
        names |= dict.fromkeys(created(store, record(1, "bob")), "b")
        order += claimed(a, names, 1) + " "
    assert order == "A0 b0 A1 "


def test_a_late_job_waits_for_one_turn_of_each_other_job(store: JobStore, a: PictureStream) -> None:
    names = created(store, record(3), record(3))
    first = claimed(a, names, 1)
    names |= dict.fromkeys(created(store, record(1)), "late")
    assert f"{first} {claimed(a, names, 3)}" == "A0 B0 A1 late0"


def test_a_large_score_job_does_not_starve_small_requests(
    connection: Redis, settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = read_info(resolve(settings.storage, "toy", "denoiser")).digest
    runner = Runner(connection, settings, "w")
    runner.models.load()
    large = record(8, digest=digest, repeats=10)
    add_job(store, large)
    runner.run_once()  # the batch of 8 is full of it
    small = [record(2, digest=digest) for _ in range(3)]
    for job in small:
        add_job(store, job)
    seen, finish = dict[str, int](), runner.store.finish

    def note(stream: PictureStream, results: Sequence[tuple[Claim, JobResult]]) -> set[str]:
        seen.update({claim.job: store.done_count(large.id) for claim, _ in results})
        return finish(stream, results)

    monkeypatch.setattr(runner.store, "finish", note)
    until(lambda: runner.run_once() or store.ended([large.id]), every_s=0)
    assert list(seen)[-1] == large.id
    # the next batch had two pictures of each of the four jobs, and others may have been stored before the grids
    assert all(10 <= seen[job.id] < 40 for job in small)
