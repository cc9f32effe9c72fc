"""Idempotency keys: one request creates one job."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from service.contract.errors import KeyReuse
from service.store import keys
from service.store.creation import IdempotentRequest
from service.store.jobs import JobStore
from tests.service.store.helpers import DIGEST, add_job, record


def test_concurrent_requests_with_one_key_create_one_job(store: JobStore, connection: Redis) -> None:
    request = IdempotentRequest("", "key", "request")
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: add_job(store, record(), request), range(8)))
    (job_id,) = ids
    assert connection.exists(keys.job(job_id))
    assert 86400 - 60 < connection.ttl(request.redis_key) <= 86400
    assert connection.zcard(keys.OPEN) == 1
    assert connection.hgetall(keys.pending_counts(DIGEST)) == {b"": b"2"}
    with pytest.raises(KeyReuse):
        add_job(store, record(), IdempotentRequest("", "key", "another request"))
    assert connection.zcard(keys.OPEN) == 1


def test_a_deleted_job_leaves_nothing_of_its_request_but_the_key_of_a_later_one_stays(
    store: JobStore, connection: Redis
) -> None:
    request = IdempotentRequest("", "key", "request")
    first = add_job(store, record(), request)
    connection.delete(request.redis_key)  # as it expires
    later = add_job(store, record(), request)
    for job_id, left in ((first, 1), (later, 0)):
        store.cancel(job_id)
        assert store.delete(job_id)
        assert connection.exists(request.redis_key) == left
