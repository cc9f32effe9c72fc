"""Results in a bucket: what a finished picture costs in Redis, and everything there after Redis was emptied."""

from pathlib import Path
from uuid import uuid4

from redis import Redis

from service.contract.job_ids import new_job_id
from service.contract.records import JobRecord
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
JOBS = 200  # of one picture, which cost most
MOST_BYTES = 1536


def memory(connection: Redis, job: JobRecord) -> int:
    """Return the bytes of all keys that belong to a job."""
    return sum(connection.memory_usage(key, samples=0) or 0 for key in connection.scan_iter(f"*{job.id}*", count=5000))


def test_pictures_outlive_redis_and_hardly_cost_it_memory(
    s3_server: str, connection: Redis, settings: Settings
) -> None:
    root = open_storage(f"s3://{BUCKET}/{uuid4().hex}/results")
    store, writer = JobStore(connection, settings), ResultWriter(root, 60)
    jobs = [record(1).model_copy(update={"id": new_job_id(1767268800.0 + i)}) for i in range(JOBS)]
    several = record(8).model_copy(update={"id": new_job_id(1767272400.0)})
    for i, job in enumerate(jobs):
        finish(store, writer, job, [noise(i, PNG_BYTES)])
    finish(store, writer, several, [png(seed) for seed in range(8)])
    for job in (*jobs, several):
        connection.delete(keys.verdicts(job.id), keys.events(job.id))  # as they do RECENT_S after the end
    spent = [memory(connection, job) for job in jobs[::20]]
    print(
        f"bytes of Redis per finished picture, one a job: {max(spent)}; eight a job: {memory(connection, several) / 8}"
    )
    assert max(spent) <= MOST_BYTES
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
    assert prune(writer.files, 1, None, 1767268800.0 + 86400 + 3600) == 1  # the hour of all that are left
    assert list(writer.files.job_ids("")) == []
    assert not isinstance(root, Path)
