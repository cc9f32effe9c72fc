"""The list of jobs and its pages, cancelling a job, and jobs that have expired."""

import io
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from service.api.uploads import read_submission
from service.contract.records import JobResult, new_job_id
from service.files import GRID, PictureFiles, picture_name
from service.settings import Settings
from service.store import keys, workers
from service.store.claims import PictureStream
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.conftest import running
from tests.service.api.answers import LISTS, pixels, problem, submitted
from tests.service.api.uploads.zips import png
from tests.service.store.helpers import DIGEST, RESULT, add_job, commit_all, record


def test_jobs_are_listed_newest_first_in_pages_that_new_jobs_do_not_shift(
    client: httpx.Client, alive: JobStore
) -> None:
    assert client.get("/jobs").json() == {"jobs": [], "next": None}
    ids = []
    for _ in range(5):
        ids.append(submitted(client))
        time.sleep(0.002)  # times have milliseconds
    alive.cancel(ids[2])
    page = client.get("/jobs").json()
    assert ([job["id"] for job in page["jobs"]], page["next"]) == (ids[::-1], None)
    assert client.get("/jobs", params={"limit": 5}).json() == page  # exactly full, and nothing follows
    whole = client.get(f"/jobs/{ids[2]}").json()
    assert whole["labels"] == LISTS
    asked = ("labels", "layouts", "first", "trajectory", "columns", "delay", "ahead", "eta")
    assert page["jobs"][2] == {name: value for name, value in whole.items() if name not in (*asked, "result")}
    seen, cursor = [], None
    for size in (2, 2, 1):
        page = client.get("/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        assert len(page["jobs"]) == size
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next"]
        submitted(client)
    assert (seen, cursor) == (ids[::-1], None)


def test_a_list_of_jobs_reads_a_few_hundred_bytes_of_each(client: httpx.Client, alive: JobStore) -> None:
    large = record(256, labels=[["red cube", "blue sphere"]] * 256, options={"steps": 4})
    add_job(alive, large)
    assert len(alive.connection.hget(keys.job(large.id), "record")) > 7000
    assert len(alive.connection.hget(keys.job(large.id), "summary")) < 600
    alive.connection.hdel(keys.job(large.id), "record")
    (head,) = client.get("/jobs").json()["jobs"]
    assert (head["id"], head["progress"], head["options"]["steps"]) == (large.id, {"done": 0, "total": 256}, 4)


def test_a_job_of_a_version_without_summaries_is_listed(client: httpx.Client, alive: JobStore) -> None:
    ids = [submitted(client) for _ in range(2)]
    expected = client.get("/jobs").json()
    alive.connection.hdel(keys.job(ids[0]), "summary")
    assert client.get("/jobs").json() == expected


def test_the_name_of_a_key_of_a_job_is_no_job(client: httpx.Client, alive: JobStore) -> None:
    address = f"/jobs/{submitted(client)}:events"
    problem(client.get(address), 404, "unknown-job")
    problem(client.delete(address), 404, "unknown-job")


def test_a_job_whose_keys_are_of_another_kind_hides_no_others(client: httpx.Client, alive: JobStore) -> None:
    broken, other = submitted(client), submitted(client)
    alive.connection.set(keys.verdicts(broken), "")
    assert [job["id"] for job in client.get("/jobs").json()["jobs"]] == [other]


@pytest.mark.parametrize("sampler", [b"a newer sampler", b"damaged: \xff"])
def test_a_job_that_this_version_cannot_read_hides_no_others_and_can_be_cancelled(
    client: httpx.Client, alive: JobStore, sampler: bytes
) -> None:
    newer, other = submitted(client), submitted(client)
    for field in ("record", "summary"):
        before, _, after = alive.connection.hget(keys.job(newer), field).encode().partition(b"sde_dpmpp_2m")
        alive.connection.hset(keys.job(newer), field, before + sampler + after)
    assert [job["id"] for job in client.get("/jobs").json()["jobs"]] == [other]
    body = problem(client.get(f"/jobs/{newer}"), 503, "unavailable")
    assert "newer version" in body["detail"]
    assert alive.cancel(newer)


def test_a_job_with_an_option_of_a_newer_version_is_shown_but_not_retried_without_it(
    client: httpx.Client, alive: JobStore
) -> None:
    newer = submitted(client, steps=2)
    raw = alive.connection.hget(keys.job(newer), "record")
    alive.connection.hset(keys.job(newer), "record", raw.replace('"options":{', '"options":{"glow":0.5,'))
    alive.cancel(newer)
    assert client.get(f"/jobs/{newer}").json()["status"] == "cancelled"
    assert "newer version" in problem(client.post(f"/jobs/{newer}/retry"), 503, "unavailable")["detail"]


@pytest.mark.parametrize("query", ["limit=101", "cursor=x"])
def test_page_parameters_that_are_not_valid(client: httpx.Client, query: str) -> None:
    problem(client.get(f"/jobs?{query}"), 422, "invalid-request")


def test_a_job_is_cancelled_once(client: httpx.Client, alive: JobStore) -> None:
    job = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).json()
    response = client.post(f"/jobs/{job['id']}/cancel")
    assert response.status_code == 200
    assert (response.json()["id"], response.json()["status"]) == (job["id"], "cancelled")
    body = problem(client.post(f"/jobs/{job['id']}/cancel"), 409, "job-ended")
    assert body["job_status"] == "cancelled"


def test_until_the_next_release_deleting_an_open_job_cancels_it(client: httpx.Client, alive: JobStore) -> None:
    job_id = submitted(client)
    response = client.delete(f"/jobs/{job_id}")
    assert (response.json()["status"], response.headers["deprecation"]) == ("cancelled", "@1796083200")
    assert client.get(f"/jobs/{job_id}").json()["status"] == "cancelled"
    response = client.delete(f"/jobs/{job_id}")
    assert "deprecation" not in response.headers
    problem(client.get(f"/jobs/{job_id}"), 404, "unknown-job")


def test_a_failed_job_is_retried_with_the_same_pictures(
    client: httpx.Client, alive: JobStore, connection: Redis, settings: Settings
) -> None:
    body = {"steps": 1, "seed": 3, "sampler": "ddim", "trajectory": 2, "columns": 1}
    failed = submitted(client, **body)
    alive.fail(failed, "workers died")
    with running(connection, settings):
        other = client.post("/generate", json={"labels": LISTS, **body}).json()
        again = client.post(f"/jobs/{failed}/retry").json()
    assert (again["status"], again["options"]) == ("finished", other["options"])
    for path in ("grid.png", "images/0.png", "trajectories/1.png"):
        first, second = (client.get(f"/jobs/{job['id']}/{path}").content for job in (other, again))
        assert first == second
    assert client.get(f"/jobs/{failed}").json()["status"] == "failed"


def test_a_retry_with_a_key_is_one_job(client: httpx.Client, alive: JobStore) -> None:
    job_id, headers = submitted(client), {"prefer": "respond-async", "idempotency-key": "again"}
    alive.cancel(job_id)
    ids = {client.post(f"/jobs/{job_id}/retry", headers=headers).json()["id"] for _ in range(2)}
    assert len(ids) == 1
    assert ids != {job_id}


def test_only_failed_and_cancelled_jobs_are_retried(client: httpx.Client, alive: JobStore) -> None:
    body = problem(client.post(f"/jobs/{submitted(client)}/retry"), 409, "not-failed")
    assert body["job_status"] == "queued"
    problem(client.post("/jobs/unknown/retry"), 404, "unknown-job")


def finished(store: JobStore, n: int, best: int = 0, repeats: int = 1, **about: Any) -> tuple[str, list[bytes]]:
    """Return a job that a worker without a network has finished, and the pictures of all its runs."""
    job = record(n, repeats=repeats, kind="generate" if repeats == 1 else "score", **about)
    add_job(store, job)
    pngs = [png(seed) for seed in range(job.total)]
    files = PictureFiles(store.settings.pictures)
    for index, one in enumerate(pngs):
        files.write(job.id, picture_name(index), one)
    files.write(job.id, GRID, b"grid")
    stream = PictureStream(store.connection, store.settings, DIGEST, "w")
    complete = commit_all(store, stream)
    result = JobResult(repeats=RESULT.repeats * repeats, best=best)
    store.finish(stream, [(claim, result) for claim in complete])
    assert store.ended([job.id])
    return job.id, pngs


def test_the_pictures_of_a_job_come_as_a_zip(client: httpx.Client, alive: JobStore) -> None:
    job_id, pngs = finished(alive, 20)  # more than are fetched together
    answer = client.get(f"/jobs/{job_id}/pictures.zip")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
    assert answer.headers["content-disposition"] == f'attachment; filename="{job_id[:8]}.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert [(name, archive.read(name)) for name in archive.namelist()] == [
            (f"{i}.png", one) for i, one in enumerate(pngs)
        ]
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o644}
    assert client.get(f"/jobs/{job_id}/pictures.zip").content == answer.content


def test_the_zip_of_a_score_has_the_best_run_and_can_be_scored(client: httpx.Client, alive: JobStore) -> None:
    job_id, pngs = finished(alive, 3, best=1, repeats=3)
    content = client.get(f"/jobs/{job_id}/pictures.zip").content
    pictures = read_submission(io.BytesIO(content), 3)
    assert [pixels(one.read()).tolist() for one in pictures] == [pixels(one).tolist() for one in pngs[3:6]]


def test_what_a_job_that_ended_early_lacks_is_not_worth_waiting_for(client: httpx.Client, alive: JobStore) -> None:
    names = {"grid.png": "the grid", "images/1.png": "picture 1", "pictures.zip": "the zip of all pictures"}
    ends = {
        "is not ready; the job is queued": lambda _: None,
        "will never be ready: the job was cancelled": alive.cancel,
        "will never be ready: the job failed": lambda job_id: alive.fail(job_id, "workers died"),
    }
    for detail, end in ends.items():
        job_id = submitted(client)
        end(job_id)
        for path, what in names.items():
            answer = problem(client.get(f"/jobs/{job_id}/{path}"), 409, "not-ready")
            assert answer["detail"] == f"{what} {detail}"


def test_an_ended_job_is_deleted_with_its_results(client: httpx.Client, working: Runner) -> None:
    job = client.post("/generate", json={"labels": LISTS, "steps": 1}).json()
    address, folder = f"/jobs/{job['id']}", PictureFiles(working.settings.pictures).folder(job["id"])
    assert client.get(f"{address}/images/0.png").status_code == 200
    assert isinstance(folder, Path)
    assert {file.name for file in folder.iterdir()} == {"0.png", "1.png", "grid.png"}
    assert client.delete(address).json() == job
    for path in ("", "/grid.png", "/images/0.png", "/events"):
        problem(client.get(address + path), 404, "unknown-job")
    problem(client.delete(address), 404, "unknown-job")
    assert client.get("/jobs").json()["jobs"] == []
    assert working.connection.keys(f"{keys.job(job['id'])}*") == []
    assert not folder.exists()


def test_a_job_that_is_created_cancelled_and_deleted_takes_no_room(client: httpx.Client, alive: JobStore) -> None:
    def taken(requests: int) -> dict[str, int]:
        for request in range(requests):
            headers = {"prefer": "respond-async", "idempotency-key": f"key-{request}"}
            address = client.post("/generate", json={"labels": LISTS}, headers=headers).headers["location"]
            for _ in range(2):  # cancels, deletes
                assert client.delete(address).status_code == 200
        redis: Any = alive.connection
        return {key: redis.memory_usage(key) for key in redis.keys("labelgrid:*")}

    assert taken(1) == taken(20)  # what a model's first job creates, is there


def test_a_job_that_is_older_than_jobs_are_kept_is_410(client: httpx.Client, settings: Settings) -> None:
    for age_s, status, slug in ((settings.keep_s + 60, 410, "expired-job"), (60, 404, "unknown-job")):
        address = f"/jobs/{new_job_id(time.time() - age_s)}"
        for path in ("", "/grid.png", "/images/0.png", "/events", "/pictures.zip"):
            problem(client.get(address + path), status, slug)
        problem(client.delete(address), status, slug)


def test_a_finished_job_whose_files_are_gone_has_expired(client: httpx.Client, alive: JobStore) -> None:
    job_id, _ = finished(alive, 2)
    PictureFiles(alive.settings.pictures).remove(job_id)
    for path in ("/images/0.png", "/grid.png", "/pictures.zip"):
        problem(client.get(f"/jobs/{job_id}{path}"), 410, "expired-job")
    problem(client.get(f"/jobs/{job_id}/images/2.png"), 404, "unknown-picture")


def test_storage_that_fails_or_hangs_is_a_503_and_the_rest_is_served(
    client: httpx.Client, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, pngs = finished(alive, 1)
    hang = threading.Event()

    def fail(path: Path, start: int, end: int | None) -> bytes:
        raise OSError("connection refused")

    def block(path: Path, start: int, end: int | None) -> bytes:
        hang.wait()
        raise OSError

    monkeypatch.setattr("service.api.results.PATIENCE_S", 0.01)
    for broken in (fail, block):
        with monkeypatch.context() as patch:
            patch.setattr("shared.storage.read", broken)
            answer = client.get(f"/jobs/{job_id}/images/0.png")
            assert problem(answer, 503, "unavailable")["detail"].startswith("the storage of pictures")
            assert client.get(f"/jobs/{job_id}").json()["status"] == "finished"
            assert client.get("/healthz").status_code == 200
    hang.set()
    monkeypatch.undo()
    assert client.get(f"/jobs/{job_id}/images/0.png").content == pngs[0]


def test_a_job_and_the_readiness_say_that_no_worker_can_store_pictures(client: httpx.Client, alive: JobStore) -> None:
    job_id = submitted(client)
    assert client.get(f"/jobs/{job_id}").json()["delay"] is None
    workers.announce(alive.connection, "other", {"storage_problem": "disk full"}, lease_s=60)
    ready = client.get("/readyz").json()
    assert (ready["workers"], ready["storing"]) == (2, 1)
    workers.announce(alive.connection, "w", {"storage_problem": "disk full"}, lease_s=60)
    assert client.get(f"/jobs/{job_id}").json()["delay"] == "disk full"
    assert "disk full" not in problem(client.get("/readyz"), 503, "unavailable")["detail"]  # for callers without a key
