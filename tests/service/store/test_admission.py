"""Room for new jobs: simultaneous requests cannot pass together, and each owner's stored pictures are counted."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from service.contract.job_ids import new_job_id
from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys
from service.store.claims import PictureStream
from service.store.creation import NoRoom
from service.store.jobs import JobStore
from tests.service.store.helpers import DIGEST, add_job, record


@pytest.fixture
def limited(settings: Settings) -> Settings:
    limits = {"max_queued_pictures": 10, "max_queued_pictures_per_owner": 5, "max_stored_pictures_per_owner": 100}
    return settings.model_copy(update={"api_keys": "a:x", **limits})


Full = tuple[str, int, int]  # what is full, how much is taken, and the limit


def full_of(connection: Redis, settings: Settings, job: JobRecord) -> Full | None:
    """Return why a job does not fit, or create it."""
    try:
        add_job(JobStore(connection, settings), job)
    except NoRoom as error:
        return error.what, error.taken, error.most
    return None


def test_simultaneous_requests_cannot_exceed_the_limit_together(connection: Redis, settings: Settings) -> None:
    limited = settings.model_copy(update={"max_queued_pictures": 10})
    with ThreadPoolExecutor(8) as pool:
        refused = sum(pool.map(lambda _: full_of(connection, limited, record(4)) is not None, range(8)))
    assert refused == 6
    assert connection.hgetall(keys.pending_counts(DIGEST)) == {b"": b"8"}
    assert connection.zcard(keys.OPEN) == 2


def test_a_job_that_does_not_fit_leaves_nothing(connection: Redis, limited: Settings) -> None:
    assert full_of(connection, limited, record(4, "a")) is None
    before = {key: connection.dump(key) for key in connection.scan_iter("labelgrid:*")}
    assert full_of(connection, limited, record(2, "a")) == ("owner", 4, 5)
    assert full_of(connection, limited, record(7, "b")) == ("queue", 4, 10)
    assert {key: connection.dump(key) for key in connection.scan_iter("labelgrid:*")} == before


def test_pictures_in_progress_count_for_the_queue_and_not_for_their_owner(
    store: JobStore, a: PictureStream, connection: Redis, limited: Settings
) -> None:
    add_job(store, record(6, "a"))
    a.claim_new(4)
    assert full_of(connection, limited, record(4, "a")) == ("owner", 2, 5)
    assert full_of(connection, limited, record(5, "b")) == ("queue", 6, 10)
    assert full_of(connection, limited, record(4, "b")) is None


def test_a_job_larger_than_its_owners_share_leaves_the_others_theirs(connection: Redis, limited: Settings) -> None:
    assert full_of(connection, limited, record(30, "a")) is None  # an empty queue takes it
    assert full_of(connection, limited, record(1, "a")) == ("owner", 30, 5)
    assert full_of(connection, limited, record(6, "b")) == ("queue", 5, 10)
    assert full_of(connection, limited, record(5, "b")) is None
    assert full_of(connection, limited, record(1, "c")) == ("queue", 10, 10)


def test_without_keys_a_large_job_fills_the_queue(connection: Redis, limited: Settings) -> None:
    open_to_all = limited.model_copy(update={"api_keys": ""})
    assert full_of(connection, open_to_all, record(30)) is None
    assert full_of(connection, open_to_all, record(1)) == ("queue", 30, 10)


def stored(connection: Redis, owner: str = "a") -> int:
    return sum(map(int, connection.hvals(keys.stored(owner))))


def test_stored_pictures_count_from_creation_whatever_becomes_of_the_job_until_it_is_deleted(
    store: JobStore, connection: Redis, limited: Settings
) -> None:
    job, other = record(60, "a"), record(40, "a", digest="e" * 64)
    for one in (job, other):
        assert full_of(connection, limited, one) is None
    one_more = record(1, "a", digest="f" * 64)
    assert full_of(connection, limited, one_more) == ("stored", 100, 100)
    assert full_of(connection, limited, record(1, "b", digest="f" * 64)) is None
    store.cancel(other.id)
    assert full_of(connection, limited, one_more) == ("stored", 100, 100)
    assert [store.delete(one.id) for one in (job, other, other)] == [False, True, False]  # the first one is open
    assert stored(connection) == 60
    assert full_of(connection, limited, one_more) is None
    assert (stored(connection), stored(connection, "b")) == (61, 1)


def test_pictures_no_longer_count_once_the_hour_of_their_job_has_expired(connection: Redis, limited: Settings) -> None:
    lifetime_s, now = limited.job_timeout_s + limited.keep_s, connection.time()[0]
    old = record(100, "a", id=new_job_id(now - lifetime_s - 3600))
    assert full_of(connection, limited, old) is None
    assert stored(connection) == 100
    young = record(100, "a", id=new_job_id(now - lifetime_s + 60), digest="e" * 64)
    assert full_of(connection, limited, young) is None
    assert stored(connection) == 100
    assert full_of(connection, limited, record(1, "a", digest="f" * 64)) == ("stored", 100, 100)
    assert 0 <= lifetime_s + 3600 - connection.ttl(keys.stored("a")) < 60


def test_without_keys_no_stored_pictures_are_counted(store: JobStore, connection: Redis, limited: Settings) -> None:
    open_to_all = limited.model_copy(update={"api_keys": "", "max_queued_pictures": 1000})
    jobs = [record(70) for _ in range(2)]
    assert [full_of(connection, open_to_all, job) for job in jobs] == [None, None]
    store.cancel(jobs[0].id)
    assert store.delete(jobs[0].id)
    assert not connection.exists(keys.stored(""))
