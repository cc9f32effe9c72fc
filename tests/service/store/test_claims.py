"""Claims: owners take turns, leases expire, and pictures that kill workers are given up."""

import time
from collections.abc import Sequence

import pytest
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import claims, keys
from service.store.claims import GROUP, Claim, PictureStream, triage
from service.store.jobs import UNREADABLE, JobStore
from tests.service.store.ageing import MINUTE_S, age
from tests.service.store.helpers import DIGEST, add_job, full, record


def indices(taken: Sequence[Claim]) -> list[int | None]:
    return [claim.index for claim in taken]


def test_new_pictures_do_not_take_the_places_of_those_with_expired_leases(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(3))
    store.claim_new(a, 5)
    age(connection, MINUTE_S)
    assert b.claim_stale(0, may_be_alone=False) == ([], [])  # its batch is full
    taken = [indices(store.take_over(b, room, may_be_alone=False)) for room in (0, 2, 2, 2)]
    assert taken == [[], [0, 1], [2], []]  # at once, not a quarter of a lease later


def test_a_lease_lasts_while_it_is_renewed_which_counts_no_delivery(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream
) -> None:
    add_job(store, record(1))
    store.claim_new(a, 1)
    age(connection, MINUTE_S)
    a.renew()
    assert b.claim_stale(1, may_be_alone=True) == ([], [])
    (pending,) = connection.xpending_range(a.key, GROUP, "-", "+", 9)
    assert (pending["consumer"], pending["times_delivered"]) == ("a", 1)


def test_suspects_do_not_hold_up_the_other_pictures_while_redis_is_full(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream, dead: PictureStream
) -> None:
    add_job(store, record(2))
    suspect, _ = store.claim_new(dead, 2)
    of_dead_worker(connection, dead, [suspect.entry], claims.IN_BATCHES)
    age(connection, MINUTE_S)
    with full(connection):
        taken, hopeless = b.claim_stale(5, may_be_alone=True)
    assert (indices(taken), hopeless) == ([1], [])
    assert indices(a.claim_stale(5, may_be_alone=True)[0]) == [0]


def test_a_job_that_a_worker_cannot_read_fails_and_says_what_to_do(
    store: JobStore, a: PictureStream, b: PictureStream, connection: Redis
) -> None:
    """As one with an option of a later version: without it the pictures would be others."""
    unreadable, late, other = record(3), record(1), record(1)
    for job in (unreadable, late, other):
        add_job(store, job)
    assert indices(store.claim_new(a, 2)) == [0, 0]
    for job in (unreadable, late):
        newer = job.model_dump_json().replace('"options":{', '"options":{"glow":0.5,')
        connection.hset(keys.job(job.id), "record", newer)
    assert [claim.job for claim in store.claim_new(b, 9)] == [other.id]
    age(connection, MINUTE_S)
    assert [claim.job for claim in store.take_over(b, 9, may_be_alone=True)] == []
    for job in (unreadable, late):
        assert connection.hmget(keys.job(job.id), "status", "error") == ["failed", UNREADABLE]
    assert connection.xlen(a.key) == 1


def test_an_entry_that_is_neither_picture_nor_grid_is_removed(
    store: JobStore, a: PictureStream, connection: Redis
) -> None:
    add_job(store, record(1))
    connection.xadd(a.key, {"animation": "j", "frame": 1})
    assert indices(store.claim_new(a, 5)) == [0]
    assert connection.xlen(a.key) == len(a.leased) == 1


@pytest.mark.parametrize("most", [2, 3, 4, 9])
def test_leases_are_sorted_by_how_many_workers_died_with_them(most: int) -> None:
    found = triage([(str(deliveries), deliveries) for deliveries in range(11)], most)
    batched = min(claims.IN_BATCHES, most - 1)
    assert found.take == [str(n) for n in range(batched)]
    assert found.alone == [str(n) for n in range(batched, most)]
    assert found.hopeless == [str(n) for n in range(most, 11)]


def of_dead_worker(connection: Redis, stream: PictureStream, entries: list[str], deliveries: int) -> None:
    connection.xclaim(stream.key, GROUP, stream.consumer, 0, entries, idle=60_000, retrycount=deliveries, justid=True)


def test_a_worker_that_samples_others_leaves_a_suspect_alone(
    connection: Redis, store: JobStore, a: PictureStream, dead: PictureStream
) -> None:
    """It would wait there for its turn, and the death of that worker would count against it."""
    add_job(store, record(2))
    suspect, _ = store.claim_new(dead, 5)
    of_dead_worker(connection, dead, [suspect.entry], deliveries=2)
    assert a.claim_stale(5, may_be_alone=False) == ([], [])
    assert a.suspects == 1
    assert [one["times_delivered"] for one in connection.xpending_range(a.key, GROUP, "-", "+", 5)] == [2, 1]


def test_one_worker_samples_suspects_and_the_others_go_on(
    connection: Redis, store: JobStore, a: PictureStream, b: PictureStream, dead: PictureStream
) -> None:
    add_job(store, record(6))
    entries = [claim.entry for claim in store.claim_new(dead, 6)]
    of_dead_worker(connection, dead, entries[:5], deliveries=2)
    of_dead_worker(connection, dead, entries[5:], deliveries=1)
    assert indices(a.claim_stale(5, may_be_alone=True)[0]) == [0]
    assert [(one.index, one.alone) for one in b.claim_stale(5, may_be_alone=True)[0]] == [(5, False)]
    assert (a.suspects, b.suspects) == (4, 0)
    connection.pexpire(keys.suspects(DIGEST), 1000)
    a.claim_stale(0, may_be_alone=False)
    assert connection.pttl(keys.suspects(DIGEST)) > 1000  # it remains the one as long as it asks


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
    store.claim_new(a, 5)
    connection.flushall()
    a.renew()
    a.release(list(a.leased))
    assert a.claim_stale(1, may_be_alone=True) == ([], [])  # workers call this before claim_new
    add_job(store, record(1))
    assert len(store.claim_new(a, 5)) == 1


def created(store: JobStore, *jobs: JobRecord) -> dict[str, str]:
    """Create jobs and return a letter for each id."""
    for job in jobs:
        add_job(store, job)
    return {job.id: letter for job, letter in zip(jobs, "ABCDEFGH", strict=False)}


def claimed(store: JobStore, a: PictureStream, names: dict[str, str], room: int) -> str:
    return " ".join(f"{names[claim.job]}{claim.index}" for claim in store.claim_new(a, room))


def test_jobs_take_turns_however_the_claims_are_cut(store: JobStore, a: PictureStream) -> None:
    names = created(store, record(5), record(1), record(3))
    assert claimed(store, a, names, 4) == "A0 B0 C0 A1"
    assert claimed(store, a, names, 1) == "C1"
    assert claimed(store, a, names, 9) == "A2 C2 A3 A4"
    assert claimed(store, a, names, 9) == ""


def test_owners_take_turns_however_many_jobs_each_has(store: JobStore, a: PictureStream) -> None:
    names = created(store, *(record(2, "alice") for _ in range(4)), record(3, "bob"))
    assert claimed(store, a, names, 3) == "A0 E0 B0"
    assert claimed(store, a, names, 4) == "E1 C0 E2 D0"
    assert claimed(store, a, names, 9) == "A1 B1 C1 D1"


def test_frequent_requests_do_not_come_first_every_time(store: JobStore, a: PictureStream) -> None:
    names = created(store, record(4, "alice"))
    order = ""
    for _ in range(3):
        names |= dict.fromkeys(created(store, record(1, "bob")), "b")
        order += claimed(store, a, names, 1) + " "
    assert order == "A0 b0 A1 "
