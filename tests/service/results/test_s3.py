"""Results in a bucket: what a finished picture costs in Redis, and everything there after Redis was emptied.

A day of more jobs, with the bytes per picture: KEPT_JOBS=5000 python -m pytest -s tests/service/results/test_s3.py
"""

import os
from pathlib import Path
from uuid import uuid4

from redis import Redis

from service.contract.job_ids import new_job_id
from service.results.retention import prune
from service.results.writer import ResultWriter
from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from shared.storage import open_storage
from tests.conftest import serving
from tests.s3 import BUCKET
from tests.service.api.uploads.zips import png
from tests.service.results.helpers import finish, noise
from tests.service.store.helpers import record

PNG_BYTES = 90_000  # of a 320x240 picture
JOBS = int(os.environ.get("KEPT_JOBS", "200"))  # of one picture, which cost most; created over a day
BEGIN, DAY_S = 1767268800.0, 86400  # seconds since 1970; at a full hour
MOST_BYTES = 1536


def memory(connection: Redis, part: str) -> int:
    """Return the bytes of all keys whose name contains `part`."""
    found = set(connection.scan_iter(f"*{part}*", count=5000))
    return sum(connection.memory_usage(key, samples=0) or 0 for key in found)


def kept(connection: Redis) -> int:
    """Return the bytes of all keys and of the tables that hold them.

    Buffers for clients and for the file on disk are not among them, nor the log of slow commands: these depend on time.
    """
    tables: dict[str, int] = connection.memory_stats()["db.0"]
    return sum(tables.values()) + memory(connection, "")


def test_pictures_outlive_redis_and_hardly_cost_it_memory(
    s3_server: str, connection: Redis, settings: Settings
) -> None:
    root = open_storage(f"s3://{BUCKET}/{uuid4().hex}/results")
    store, writer = JobStore(connection, settings), ResultWriter(root, 60)
    ids = [new_job_id(BEGIN + i * DAY_S / JOBS) for i in range(JOBS)]
    jobs = [record(1).model_copy(update={"id": job_id}) for job_id in ids]
    several = record(8).model_copy(update={"id": new_job_id(BEGIN + DAY_S)})
    finish(store, writer, several, [png(seed) for seed in range(8)])
    connection.delete(keys.verdicts(several.id), keys.events(several.id))  # as they do RECENT_S after the end
    before = kept(connection)
    for i, job in enumerate(jobs):
        finish(store, writer, job, [noise(i, PNG_BYTES)])
        connection.delete(keys.verdicts(job.id), keys.events(job.id))
    spent = (kept(connection) - before) / JOBS  # with the index of jobs and all else
    print(f"{JOBS} jobs; bytes of Redis per finished picture, one a job: {spent:.0f}; "
          f"eight a job: {memory(connection, several.id) / 8:.0f}")  # fmt: skip
    assert max(memory(connection, job.id) for job in jobs[::20]) <= MOST_BYTES
    assert spent <= MOST_BYTES
    connection.flushall()
    with serving(settings.model_copy(update={"results": root})) as client:
        for i, job in enumerate(jobs):
            assert client.get(f"/jobs/{job.id}/images/0.png").raise_for_status().content == noise(i, PNG_BYTES)
        assert client.get(f"/jobs/{jobs[7].id}").json()["result"]["pictures"][0]["seed"]
        assert client.get(f"/jobs/{several.id}/grid.png").status_code == 200
        page = client.get("/jobs?limit=100").json()
        assert [one["id"] for one in page["jobs"]] == [several.id, *(job.id for job in reversed(jobs))][:100]
        client.delete(f"/jobs/{several.id}").raise_for_status()
    left = list(writer.files.job_ids(""))
    assert left == [job.id for job in reversed(jobs)]
    assert prune(writer.files, 1, None, 3600, BEGIN + 2 * DAY_S + 3600) == 24  # hours
    assert list(writer.files.job_ids("")) == []
    assert not isinstance(root, Path)
