"""What the store logs of a job. `test_job_model.py` has the life of jobs, `test_jobs_lua.py` a Redis that is full."""

import logging

import pytest
from redis import Redis

from service.store import keys
from service.store.jobs import JobStore
from tests.service.store.helpers import add_job, record


def test_the_log_says_how_a_job_ended_whose_record_cannot_be_read(
    store: JobStore, connection: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = record()
    add_job(store, job)
    connection.hset(keys.job(job.id), "record", "{")
    assert store.fail(job.id, "why")
    *_, line = map(vars, caplog.records)
    assert [line[name] for name in ("msg", "job_id", "reason")] == ["job failed", job.id, "why"]
