"""Results over HTTP that Redis no longer has: read, listed, searched, deleted, and for their owner alone."""

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.contract.job_ids import new_job_id
from service.contract.records import JobRecord
from service.results.writer import ResultWriter
from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from tests.conftest import serving
from tests.service.api.answers import problem
from tests.service.api.test_event_feed import read
from tests.service.api.uploads.zips import png
from tests.service.results.helpers import finish, finish_open
from tests.service.store.helpers import record

NOON = 1767268800.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def kept_client(settings: Settings, folder: Path) -> Iterator[httpx.Client]:
    with serving(settings.model_copy(update={"results": folder})) as client:
        yield client


@pytest.fixture
def writer(folder: Path) -> Iterator[ResultWriter]:
    writer = ResultWriter(folder, 60)
    yield writer
    for job_id in list(writer.files.job_ids("")):
        writer.files.remove_job("", job_id)


def a_job(n: int, second: int = 0, *, owner: str = "", repeats: int = 1, labels: str = "red cube") -> JobRecord:
    kind, at, lists = "generate" if repeats == 1 else "score", NOON + second, [[labels]] * n
    return record(n, owner, id=new_job_id(at), kind=kind, created_at=at, repeats=repeats, labels=lists)


def test_everything_is_read_as_before_once_redis_is_empty(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore
) -> None:
    job = a_job(20)
    pngs = [png(seed) for seed in range(20)]
    finish(store, writer, job, pngs)
    address = f"/jobs/{job.id}"
    paths = ("", "/grid.png", "/images/0.png", "/images/19.png", "/pictures.zip")
    fresh = [kept_client.get(address + path).raise_for_status().content for path in paths]
    assert fresh[2:4] == [pngs[0], pngs[19]]
    store.connection.delete(keys.verdicts(job.id), keys.events(job.id))  # as after RECENT_S
    for empty in (False, True):
        if empty:
            store.connection.flushall()
        assert [kept_client.get(address + path).raise_for_status().content for path in paths] == fresh
        received = read(kept_client, job.id)
        assert [event["event"] for event in received] == ["job", "end"]
        assert received[0]["data"] == received[1]["data"] == json.loads(fresh[0])
        last = {"last-event-id": received[1]["id"]}
        assert kept_client.get(f"{address}/events", headers=last).status_code == 204
        for path, detail in (("images/20", "not 20"), ("trajectories/20", "`trajectory`")):
            answer = problem(kept_client.get(f"{address}/{path}.png"), 404, "unknown-picture")
            assert answer["detail"].endswith(detail), answer
        assert [one["id"] for one in kept_client.get("/jobs").json()["jobs"]] == [job.id]
        assert kept_client.get("/jobs").json()["jobs"][0]["progress"] == {"done": 20, "total": 20}
    with zipfile.ZipFile(io.BytesIO(fresh[-1])) as archive:
        assert [archive.read(name) for name in archive.namelist()] == pngs


def test_the_grid_of_one_picture_is_the_picture(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore
) -> None:
    job = a_job(1)
    finish(store, writer, job, [png(3)])
    for empty in (False, True):
        if empty:
            store.connection.flushall()
        assert kept_client.get(f"/jobs/{job.id}/grid.png").content == png(3)


def test_the_best_run_of_a_score_is_read(kept_client: httpx.Client, writer: ResultWriter, store: JobStore) -> None:
    job = a_job(2, repeats=3)
    finish(store, writer, job, [png(seed) for seed in range(6)])
    fresh = kept_client.get(f"/jobs/{job.id}").json()
    store.connection.flushall()
    assert kept_client.get(f"/jobs/{job.id}").json() == fresh
    assert kept_client.get(f"/jobs/{job.id}/images/5.png").content == png(5)


def test_a_deleted_job_is_gone_from_storage_too(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore
) -> None:
    for empty in (False, True):
        job = a_job(1)
        finish(store, writer, job, [png(0)])
        if empty:
            store.connection.flushall()
        assert kept_client.delete(f"/jobs/{job.id}").json()["id"] == job.id
        status, slug = (404, "unknown-job") if empty else (410, "expired-job")
        for path in ("", "/images/0.png", "/grid.png", "/pictures.zip"):
            problem(kept_client.get(f"/jobs/{job.id}{path}"), status, slug)
        assert kept_client.get("/jobs").json() == {"jobs": [], "next": None}
        assert not writer.files.job("", job.id).exists()  # type: ignore[union-attr]


def test_another_owners_job_does_not_exist(kept_client: httpx.Client, writer: ResultWriter, store: JobStore) -> None:
    job = a_job(1, owner="alice")
    finish(store, writer, job, [png(0)])
    for empty in (False, True):
        if empty:
            store.connection.flushall()
        for path in ("", "/images/0.png", "/grid.png", "/pictures.zip"):
            problem(kept_client.get(f"/jobs/{job.id}{path}"), 404, "unknown-job")  # to the owner "" of no key
        problem(kept_client.delete(f"/jobs/{job.id}"), 404, "unknown-job")
        assert kept_client.get("/jobs").json()["jobs"] == []
    assert writer.files.read_job("alice", job.id) is not None


def test_jobs_in_redis_and_in_storage_are_one_list(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore
) -> None:
    old = [a_job(1, second, labels="blue sphere" if second % 2 else "red cube") for second in range(5)]
    for job in old:
        finish(store, writer, job, [png(0)])
    store.connection.flushall()
    new = [a_job(1, 10 + second) for second in range(3)]
    for job in new:
        finish(store, writer, job, [png(0)])
    expected = [job.id for job in [*reversed(new), *reversed(old)]]
    for limit in (1, 3, 4, 8, 100):
        assert ids_of_pages(kept_client, f"limit={limit}") == expected
    blue = [job.id for job in reversed(old) if job.labels == [["blue sphere"]]]
    for limit in (1, 2, 100):
        assert ids_of_pages(kept_client, f"limit={limit}&label=Blue") == blue
    assert ids_of_pages(kept_client, "label=cylinder") == []


def ids_of_pages(client: httpx.Client, query: str) -> list[str]:
    """Return the ids on all pages of the list of jobs."""
    found, cursor = list[str](), ""
    while True:
        page = client.get(f"/jobs?{query}{cursor}").raise_for_status().json()
        found += [job["id"] for job in page["jobs"]]
        if page["next"] is None:
            return found
        cursor = f"&cursor={page['next']}"


def test_pictures_of_a_running_and_a_cancelled_job_come_from_storage(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore
) -> None:
    job = a_job(2)
    store.create(job)
    problem(kept_client.get(f"/jobs/{job.id}/images/0.png"), 409, "not-ready")
    writer.files.write("", job.id, "0.png", png(0))
    for end in (False, True):
        if end:
            store.cancel(job.id)
        assert kept_client.get(f"/jobs/{job.id}/images/0.png").content == png(0)
        problem(kept_client.get(f"/jobs/{job.id}/images/1.png"), 409, "not-ready")
        problem(kept_client.get(f"/jobs/{job.id}/grid.png"), 409, "not-ready")


def test_a_finished_job_whose_files_are_gone_has_expired(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore
) -> None:
    job = a_job(1)
    finish(store, writer, job, [png(0)])
    writer.files.remove_job("", job.id)
    for path in ("/images/0.png", "/grid.png"):
        problem(kept_client.get(f"/jobs/{job.id}{path}"), 410, "expired-job")


def test_storage_that_fails_or_hangs_is_a_503_and_what_redis_has_is_served(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(1)
    finish(store, writer, job, [png(0)])
    hang = threading.Event()

    def fail(path: Path) -> bytes:
        raise OSError("connection refused")

    def block(path: Path) -> bytes:
        hang.wait()
        raise OSError

    monkeypatch.setattr("service.api.downloads.reader.PATIENCE_S", 0.01)
    for broken in (fail, block):
        with monkeypatch.context() as patch:
            patch.setattr("shared.storage.read", broken)
            answer = kept_client.get(f"/jobs/{job.id}/images/0.png")
            assert problem(answer, 503, "unavailable")["detail"].startswith("the results' storage")
            assert kept_client.get(f"/jobs/{job.id}").json()["status"] == "finished"
            assert kept_client.get("/healthz").status_code == 200
    hang.set()


def test_a_list_has_the_jobs_of_redis_while_storage_fails(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, job = a_job(1), a_job(1)
    for one in (older, job):
        finish(store, writer, one, [png(0)])
    store.delete(older.id)  # from Redis alone

    def fail(folder: Path) -> list[str]:
        raise OSError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr("shared.storage.folders", fail)
        page = kept_client.get("/jobs").json()
        assert [one["id"] for one in page["jobs"]] == [job.id]
        problem(kept_client.get("/jobs", params={"cursor": page["next"]}), 503, "unavailable")
    following = kept_client.get("/jobs", params={"cursor": page["next"]}).json()
    assert [one["id"] for one in following["jobs"]] == [older.id]


def test_a_result_that_was_never_in_storage_is_served_from_redis(
    kept_client: httpx.Client, writer: ResultWriter, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "keep_pictures", lambda *_: set())
    monkeypatch.setattr(writer, "keep_jobs", lambda *_: set())
    job = a_job(2)
    finish(store, writer, job, [png(0), png(1)])
    assert kept_client.get(f"/jobs/{job.id}/images/1.png").content == png(1)
    assert kept_client.get(f"/jobs/{job.id}/pictures.zip").status_code == 200
    store.connection.flushall()
    problem(kept_client.get(f"/jobs/{job.id}"), 404, "unknown-job")


def test_an_idempotency_key_counts_while_storage_has_its_job(
    kept_client: httpx.Client, alive: JobStore, writer: ResultWriter, store: JobStore
) -> None:
    headers = {"idempotency-key": "mine", "prefer": "respond-async"}
    body = {"labels": [["red cube"]], "seed": 7}
    job = kept_client.post("/generate", json=body, headers=headers).json()
    kept = store.record(job["id"])
    assert kept is not None
    finish_open(store, writer, kept, [png(0)])
    store.delete(job["id"])  # from Redis alone, as when it expires there
    for waits in ("wait=5", "respond-async"):
        again = kept_client.post("/generate", json=body, headers={**headers, "prefer": waits})
        assert (again.status_code, again.json()["id"]) == (200, job["id"])
    problem(kept_client.post("/generate", json={**body, "seed": 8}, headers=headers), 422, "idempotency-key-reused")
    kept_client.delete(f"/jobs/{job['id']}")
    new = kept_client.post("/generate", json={**body, "seed": 8}, headers=headers).json()
    assert new["id"] != job["id"]
