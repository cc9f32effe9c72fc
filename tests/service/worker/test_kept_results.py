"""A worker that keeps results in storage, over HTTP: the pictures of a service that does not, and none in Redis."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from service.results.files import ResultFiles
from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.conftest import running, serving
from tests.service.api.answers import LISTS
from tests.service.api.uploads.zips import png, zipped
from tests.service.processes import until

BODY = {"labels": LISTS, "steps": 2, "seed": 11, "trajectory": 3}


def contents(client: httpx.Client, job: dict[str, Any]) -> list[bytes]:
    paths = ["grid.png", "images/0.png", "images/1.png", "pictures.zip"]
    paths += [f"trajectories/{i}.png" for i in range(2) if job["trajectory"]]
    return [client.get(f"/jobs/{job['id']}/{path}").raise_for_status().content for path in paths]


def test_the_same_seed_gives_the_same_pictures_wherever_they_are_kept(
    client: httpx.Client, alive: JobStore, connection: Redis, settings: Settings, tmp_path: Path
) -> None:
    with running(connection, settings):
        expected = contents(client, client.post("/generate", json=BODY).json())
    kept = settings.model_copy(update={"results": tmp_path})
    with serving(kept) as other, running(connection, kept):
        job = other.post("/generate", json=BODY).json()
        assert (job["status"], job["id"][12]) == ("finished", "7")
        grid = other.post("/generate", json=BODY, headers={"accept": "image/png"}).content
        assert not connection.exists(keys.png(job["id"]))
        assert contents(other, job) == expected
        assert grid == expected[0]
        connection.flushall()
        assert contents(other, job) == expected
        assert other.get(f"/jobs/{job['id']}").json() == job


def test_uploaded_pictures_are_kept_too(alive: JobStore, connection: Redis, settings: Settings, tmp_path: Path) -> None:
    kept = settings.model_copy(update={"results": tmp_path})
    files = {
        "file": ("test.json", json.dumps(LISTS)),
        "pictures": ("pictures.zip", zipped({"0.png": png(0), "1.png": png(1)})),
    }
    with serving(kept) as client, running(connection, kept):
        job = client.post("/score", files=files).raise_for_status().json()
        assert not connection.exists(keys.png(job["id"]))
        fresh = contents(client, job)
        connection.flushall()
        assert contents(client, job) == fresh


@pytest.mark.parametrize("usable", [False, True])
def test_a_job_finishes_whether_or_not_storage_can_be_written(
    alive: JobStore, connection: Redis, settings: Settings, tmp_path: Path, usable: bool
) -> None:
    folder = tmp_path / "results"
    if not usable:
        folder.write_text("a file where the folder should be")
    kept = settings.model_copy(update={"results": folder})
    with serving(kept) as client, running(connection, kept):
        job = client.post("/generate", json={**BODY, "trajectory": None}).json()
        assert job["status"] == "finished"
        assert bool(connection.exists(keys.png(job["id"]))) != usable
        if usable:
            assert len(contents(client, job)) == 4


def test_a_picture_that_is_written_while_its_job_is_deleted_goes_too(
    alive: JobStore, connection: Redis, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = settings.model_copy(update={"results": tmp_path})
    write = ResultFiles.write
    with serving(kept) as client:

        def deleting(files: ResultFiles, owner: str, job_id: str, name: str, content: bytes) -> None:
            for expected in ("cancelled", "cancelled"):
                assert client.delete(f"/jobs/{job_id}").json()["status"] == expected
            write(files, owner, job_id, name, content)

        monkeypatch.setattr(ResultFiles, "write", deleting)
        body = {**BODY, "labels": LISTS[:1], "trajectory": None}
        job_id = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()["id"]
        runner = Runner(connection, kept, "w")
        runner.models.load()
        runner.run(job_id)
        until(lambda: not list(tmp_path.rglob("*.png")))
