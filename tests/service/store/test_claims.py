"""Claims: owners take turns, leases expire, and pictures that kill workers are given up."""

import time
from collections.abc import Sequence

import pytest
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import claims, keys
from service.store.claims import GROUP, Claim, PictureStream
from service.store.jobs import JobStore
from tests.service.store.ageing import MINUTE_S, age
from tests.service.store.helpers import DIGEST, add_job, full, record


def indices(taken: Sequence[Claim]) -> list[int | None]:
    return [claim.index for claim in taken]


def test_new_pictures_do_not_take_the_places_of_those_with_expired_leases(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(3))
    a.claim_new(5)
    age(connection, MINUTE_S)
    assert b.claim_stale(0, may_be_alone=False) == ([], [])  # its batch is full
    taken = [indices(b.claim_stale(room, may_be_alone=False)[0]) for room in (0, 2, 2, 2)]
    assert taken == [[], [0, 1], [2], []]  # at once, not a quarter of a lease later


def test_a_lease_lasts_while_it_is_renewed_which_counts_no_delivery(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(1))
    a.claim_new(1)
    age(connection, MINUTE_S)
    a.renew()
    assert b.claim_stale(1, may_be_alone=True) == ([], [])
    (pending,) = connection.xpending_range(a.key, GROUP, "-", "+", 9)
    assert (pending["consumer"], pending["times_delivered"]) == ("a", 1)


def test_suspects_do_not_hold_up_the_other_pictures_while_redis_is_full(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream, dead: PictureStream
) -> None:
    add_job(store, record(2))
    suspect, _ = dead.claim_new(2)
    of_dead_worker(connection, dead, [suspect.entry], claims.IN_BATCHES)
    age(connection, MINUTE_S)
    with full(connection):
        taken, hopeless = b.claim_stale(5, may_be_alone=True)
    assert (indices(taken), hopeless) == ([1], [])
    assert indices(a.claim_stale(5, may_be_alone=True)[0]) == [0]


def of_a_newer_version(store: JobStore, pictures: int) -> JobRecord:
    """Create a job with an option that this version does not know."""
    add_job(store, job := record(pictures))
    newer = job.model_dump_json().replace('"options":{', '"options":{"glow":0.5,')
    store.connection.hset(keys.job(job.id), "record", newer)
    return job


def test_many_pictures_left_to_others_do_not_hide_the_rest(
    store: JobStore, a: PictureStream, b: PictureStream, connection: Redis
) -> None:
    of_a_newer_version(store, 100)  # as many as are looked at
    assert store.begin(a, a.claim_new(100)) == []
    add_job(store, record(1))
    b.claim_new(1)
    age(connection, MINUTE_S)
    assert indices(a.claim_stale(5, may_be_alone=True)[0]) == [0]


def test_a_job_that_a_worker_cannot_read_is_left_to_others_and_fails_if_none_can(
    store: JobStore, a: PictureStream, b: PictureStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its grid, too: without the option it would have another recipe."""
    newer, other = of_a_newer_version(store, 1), record(1)
    add_job(store, other)
    store.connection.xadd(a.key, {"job": newer.id})
    assert [claim.job for claim in store.begin(a, a.claim_new(5))] == [other.id]
    assert a.claim_stale(5, may_be_alone=True) == ([], [])  # it does not try again
    counts = {one["times_delivered"] for one in store.connection.xpending_range(a.key, GROUP, "-", "+", 9)}
    assert counts == {0, 1}  # 0 of what was left, for no worker has died of it
    taken = b.claim_stale(5, may_be_alone=True)[0]  # at once
    assert [(claim.job, claim.index) for claim in taken] == [(newer.id, None), (newer.id, 0)]
    assert store.begin(b, taken) == []
    monkeypatch.setattr(claims, "UNREADABLE_S", 0.0)
    gone = b.claim_stale(5, may_be_alone=True)[1]
    assert [(claim.job, "another version" in reason) for claim, reason in gone] == [(newer.id, True)] * 2
    assert store.fail(newer.id, "its record cannot be read")
    assert store.connection.xlen(a.key) == 1


def test_an_entry_of_another_version_is_left_to_its_workers_until_none_has_taken_it(
    store: JobStore, a: PictureStream, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_job(store, record(1))
    entry = connection.xadd(a.key, {"animation": "j", "frame": 1})
    assert indices(a.claim_new(5)) == [0]
    assert a.claim_stale(5, may_be_alone=True) == ([], [])  # it does not try again
    monkeypatch.setattr(claims, "UNREADABLE_S", 0.0)
    ((claim, _),) = a.claim_stale(5, may_be_alone=True)[1]
    assert claim.entry == entry
    assert not store.fail(claim.job, "it has none")


def of_dead_worker(connection: Redis, stream: PictureStream, entries: list[str], deliveries: int) -> None:
    connection.xclaim(stream.key, GROUP, stream.consumer, 0, entries, idle=60_000, retrycount=deliveries, justid=True)


def test_a_worker_that_samples_others_leaves_a_suspect_alone(
    connection: Redis, store: JobStore, a: PictureStream, dead: PictureStream
) -> None:
    """It would wait there for its turn, and the death of that worker would count against it."""
    add_job(store, record(2))
    suspect, _ = dead.claim_new(5)
    of_dead_worker(connection, dead, [suspect.entry], deliveries=2)
    assert a.claim_stale(5, may_be_alone=False) == ([], [])
    assert a.suspects == 1
    assert [one["times_delivered"] for one in connection.xpending_range(a.key, GROUP, "-", "+", 5)] == [2, 1]


def test_one_worker_samples_suspects_and_the_others_go_on(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream, dead: PictureStream
) -> None:
    add_job(store, record(6))
    entries = [claim.entry for claim in dead.claim_new(6)]
    of_dead_worker(connection, dead, entries[:5], deliveries=2)
    of_dead_worker(connection, dead, entries[5:], deliveries=1)
    assert indices(a.claim_stale(5, may_be_alone=True)[0]) == [0]
    assert [(one.index, one.alone) for one in b.claim_stale(5, may_be_alone=True)[0]] == [(5, False)]
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
    a.claim_new(5)
    connection.flushall()
    a.renew()
    a.release(list(a.held))
    assert a.claim_stale(1, may_be_alone=True) == ([], [])  # workers call this before claim_new
    add_job(store, record(1))
    assert len(a.claim_new(5)) == 1


def created(store: JobStore, *jobs: JobRecord) -> dict[str, str]:
    """Create jobs and return a letter for each id."""
    for job in jobs:
        add_job(store, job)
    return {job.id: letter for job, letter in zip(jobs, "ABCDEFGH", strict=False)}


def claimed(a: PictureStream, names: dict[str, str], room: int) -> str:
    return " ".join(f"{names[claim.job]}{claim.index}" for claim in a.claim_new(room))


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
