"""Room for new jobs: simultaneous requests cannot pass together, and each owner's stored bytes are counted."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys
from service.store.admission import Full, NoRoom
from service.store.claims import PictureStream
from service.store.jobs import JobStore
from tests.service.store.helpers import DIGEST, RESULT, done, record


@pytest.fixture
def limited(settings: Settings) -> Settings:
    limits = {"max_queued_pictures": 10, "max_queued_pictures_per_owner": 5, "max_stored_bytes_per_owner": 4000}
    return settings.model_copy(update={"api_keys": "a:x", **limits})


def full_of(connection: Redis, settings: Settings, job: JobRecord, expected_bytes: int = 0) -> Full | None:
    """Return why a job does not fit, or create it."""
    try:
        JobStore(connection, settings).create(job, expected_bytes=expected_bytes)
    except NoRoom as error:
        return error.full
    return None


def test_simultaneous_requests_cannot_exceed_the_limit_together(connection: Redis, settings: Settings) -> None:
    limited = settings.model_copy(update={"max_queued_pictures": 10})
    with ThreadPoolExecutor(8) as pool:
        refused = sum(pool.map(lambda _: full_of(connection, limited, record(4)) is not None, range(8)))
    assert refused == 6
    assert connection.hgetall(keys.pending_counts(DIGEST)) == {b"": b"8"}
    assert connection.scard(keys.OPEN) == 2


def test_a_job_that_does_not_fit_leaves_nothing(connection: Redis, limited: Settings) -> None:
    assert full_of(connection, limited, record(4, "a")) is None
    before = set(connection.scan_iter())
    assert full_of(connection, limited, record(2, "a")) == Full("owner", 4, 5, 0)
    assert full_of(connection, limited, record(7, "b")) == Full("queue", 4, 10, 0)
    assert set(connection.scan_iter()) == before


def test_pictures_in_progress_count_for_the_queue_and_not_for_their_owner(
    store: JobStore, a: PictureStream, connection: Redis, limited: Settings
) -> None:
    store.create(record(6, "a"))
    a.claim_new(4)
    assert full_of(connection, limited, record(4, "a")) == Full("owner", 2, 5, 0)
    assert full_of(connection, limited, record(5, "b")) == Full("queue", 6, 10, 0)
    assert full_of(connection, limited, record(4, "b")) is None


def test_a_job_larger_than_its_owners_share_leaves_the_others_theirs(connection: Redis, limited: Settings) -> None:
    assert full_of(connection, limited, record(30, "a")) is None  # an empty queue takes it
    assert full_of(connection, limited, record(1, "a")) == Full("owner", 30, 5, 0)
    assert full_of(connection, limited, record(6, "b")) == Full("queue", 5, 10, 0)
    assert full_of(connection, limited, record(5, "b")) is None
    assert full_of(connection, limited, record(1, "c")) == Full("queue", 10, 10, 0)


def test_without_keys_a_large_job_fills_the_queue(connection: Redis, limited: Settings) -> None:
    open_to_all = limited.model_copy(update={"api_keys": ""})
    assert full_of(connection, open_to_all, record(30)) is None
    assert full_of(connection, open_to_all, record(1)) == Full("queue", 30, 10, 0)


def stored(connection: Redis, limited: Settings, owner: str = "a") -> int:
    """Return the owner's stored bytes, as the next request sees them."""
    job = record(1, owner, digest="e" * 64)
    full = full_of(connection, limited, job, 10**9)
    if full is None:
        connection.hdel(keys.stored_bytes(owner), job.id)
        connection.delete(keys.pending_counts("e" * 64))
        return 0
    assert full.what == "bytes"
    return full.taken


def finish(store: JobStore, stream: PictureStream, job: JobRecord) -> int:
    """Finish a job, and return the size of what it stored."""
    store.commit(stream.key, [done(claim) for claim in stream.claim_new(9)])
    store.finish({job.id: (RESULT, b"grid")})
    found = [*store.connection.hvals(keys.png(job.id)), *store.connection.hvals(keys.verdicts(job.id))]
    return sum(map(len, found)) + size_of(job)


def size_of(job: JobRecord) -> int:
    """Return the size of a job's record."""
    return len(job.write())


def test_an_owners_bytes_are_those_expected_and_then_those_stored(
    store: JobStore, a: PictureStream, connection: Redis, limited: Settings
) -> None:
    job, judged = record(2, "a"), record(1, "a", digest="f" * 64)
    store.create(job, expected_bytes=700)
    assert stored(connection, limited) == 700
    size = finish(store, a, job)
    assert size > 0
    assert stored(connection, limited) == size
    store.create(judged, uploaded=[b"x" * 50], expected_bytes=50)
    store.cancel(judged.id)
    taken = size + 50 + size_of(judged)
    assert stored(connection, limited) == taken
    assert stored(connection, limited, "b") == 0
    full = full_of(connection, limited, job, limited.max_stored_bytes_per_owner - taken + 1)
    assert full is not None
    assert (full.what, full.taken, full.most) == ("bytes", taken, limited.max_stored_bytes_per_owner)
    assert store.settings.job_ttl_s - 60 < full.expires_s <= store.settings.job_ttl_s + 60
    connection.hset(keys.stored_bytes("a"), "1", f"{connection.time()[0] + 120} 1")
    full = full_of(connection, limited, job, limited.max_stored_bytes_per_owner)
    assert full is not None
    assert full.expires_s <= 120  # until the first of them expire


def test_jobs_that_are_cancelled_at_once_count_with_their_requests(
    store: JobStore, connection: Redis, limited: Settings
) -> None:
    jobs = [record(5, "a").model_copy(update={"labels": [["x" * 100]] * 5}) for _ in range(4)]
    for job in jobs:
        assert full_of(connection, limited, job, 100) is None
        assert store.cancel(job.id)
    assert stored(connection, limited) == sum(map(size_of, jobs))
    full = full_of(connection, limited, record(1, "a"), 4000 - sum(map(size_of, jobs)) + 1)
    assert full is not None
    assert full.what == "bytes"
    for job in jobs:
        assert store.delete(job.id)
    assert stored(connection, limited) == 0


def test_uploaded_pictures_count_once(store: JobStore, a: PictureStream, connection: Redis, limited: Settings) -> None:
    judged = record(2, "a", sent=True)
    store.create(judged, uploaded=[b"x" * 50, b"y" * 60], expected_bytes=110)
    finished = [(entry, replace(one, png=b"")) for entry, one in map(done, a.claim_new(2))]
    store.commit(a.key, finished)
    store.finish({judged.id: (RESULT, b"grid")})
    verdicts = sum(len(one.verdict.write()) for _, one in finished)
    assert stored(connection, limited) == 50 + 60 + verdicts + len(b"grid") + size_of(judged)
    assert store.pngs(judged.id, [0, 1]) == [b"x" * 50, b"y" * 60]


def test_expired_bytes_no_longer_count(store: JobStore, a: PictureStream, connection: Redis, limited: Settings) -> None:
    job = record(1, "a")
    store.create(job)
    finish(store, a, job)
    (minute,) = connection.hkeys(keys.stored_bytes("a"))
    assert 0 < connection.ttl(keys.stored_bytes("a")) <= store.settings.job_timeout_s + store.settings.job_ttl_s
    connection.hset(keys.stored_bytes("a"), minute, "1 500")
    assert stored(connection, limited) == 0
    assert not connection.hexists(keys.stored_bytes("a"), minute)


def test_a_deleted_job_frees_its_bytes_and_leaves_its_tombstone(
    store: JobStore, a: PictureStream, connection: Redis, limited: Settings
) -> None:
    job, kept = (record(1, "a", created_at=1e9) for _ in range(2))
    for one in (job, kept):
        store.create(one)
    assert not store.delete(job.id)  # while it is open
    store.commit(a.key, [done(claim) for claim in a.claim_new(2)])
    store.finish({one.id: (RESULT, b"grid") for one in (job, kept)})
    before = stored(connection, limited)
    assert store.delete(job.id)
    assert stored(connection, limited) == before // 2
    assert connection.keys(f"{keys.job(job.id)}*") == []
    assert connection.get(keys.tombstone(job.id)) == b"a"
    assert not store.delete(job.id)
    assert stored(connection, limited) == before // 2
