"""Each owner's list of jobs."""

import time

from redis import Redis

from service.store import keys
from service.store.job_index import id_of
from service.store.jobs import JobStore
from tests.service.store.helpers import record


def test_jobs_older_than_a_lifetime_leave_the_list(store: JobStore, connection: Redis) -> None:
    lifetime_s = store.settings.job_ttl_s + store.settings.job_timeout_s
    old, young = record(created_at=time.time() - lifetime_s - 2), record(created_at=time.time() - lifetime_s + 60)
    for job in (old, young, record()):
        store.create(job)
    members = [raw.decode() for raw in connection.zrange(keys.index(""), 0, -1)]
    assert [id_of(member) for member in members][:1] == [young.id]
    assert len(members) == 2
    assert 0 < connection.ttl(keys.index("")) <= lifetime_s
