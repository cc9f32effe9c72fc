"""POST /score with uploaded pictures: their verdicts, what is refused, and the client's ways to upload them."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis
from typer.testing import CliRunner

from service.api.results import Slots
from service.api.routes import score
from service.api.server import Server
from service.api.uploads.png import check_picture
from service.client import Client
from service.client.__main__ import app
from service.contract.records import ACTIVE
from service.pictures import PictureFiles
from service.settings import Settings
from service.store.connection import text
from service.store.creation import JobCreator
from service.store.doorbell import ModelName
from service.store.jobs import JobStore
from service.worker.judge import Uploads
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.pictures import marked_grid, read_png, to_images
from shared.registry import resolve
from tests.conftest import api_server, client_of, running
from tests.service.api.answers import nothing_is_queued, problem
from tests.service.api.uploads.zips import GOOD, LISTS, TEST_FILE, png, without, zipped

ZIP = zipped({"0.png": png(0), "1.png": png(1)}, zipfile.ZIP_STORED)


def send(client: httpx.Client, pictures: bytes, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    files = {"file": TEST_FILE, "pictures": ("submission.zip", pictures)}
    return client.post("/score", files=files, data=fields, headers=headers)


def test_sampled_pictures_get_the_same_scores_when_uploaded(client: httpx.Client, working: Runner) -> None:
    body = {"conditions": LISTS, "repeats": 1, "steps": 3, "seed": 5}
    sampled = client.post("/score/conditions", json=body).json()["result"]
    pngs = [client.get(picture["url"]).content for picture in sampled["pictures"]]
    response = send(client, zipped({f"out/{i}.png": one for i, one in enumerate(pngs)}), columns=2)
    assert response.status_code == 200, response.text
    job = response.json()
    assert (job["kind"], job["status"], job["seed"], job["options"]) == ("score", "finished", None, None)
    assert (job["model"], job["progress"]) == ("toy-evaluator", {"done": 3, "total": 3})
    result = job["result"]
    assert result["repeats"] == [{**sampled["repeats"][0], "seed": None}]
    for name in ("accuracy", "exact_match", "f1"):
        assert result[name] == sampled[name]
    for one, other, content in zip(result["pictures"], sampled["pictures"], pngs, strict=True):
        assert (one["labels"], one["accuracy"], one["exact"]) == (other["labels"], other["accuracy"], other["exact"])
        assert one["seed"] is None
        for label, p in one["scores"].items():  # judged from 8 bits, not from what the network gave
            assert p == pytest.approx(other["scores"].get(label, p), abs=0.02)
        assert client.get(one["url"]).content == content
    sheet = marked_grid(np.stack([read_png(one) for one in pngs]), [one["exact"] for one in result["pictures"]], 2)
    assert np.array_equal(read_png(client.get(result["grid_url"]).content), sheet)
    assert client.get("/jobs").json()["jobs"][0]["id"] == job["id"]


def test_a_retry_needs_no_second_upload(
    client: httpx.Client, alive: JobStore, connection: Redis, settings: Settings
) -> None:
    job_id = send(client, zipped(GOOD), {"prefer": "respond-async"}).json()["id"]
    alive.fail(job_id, "workers died")
    with running(connection, settings):
        job = client.post(f"/jobs/{job_id}/retry").json()
    assert (job["status"], job["progress"]) == ("finished", {"done": 3, "total": 3})
    assert client.get(f"/jobs/{job['id']}/images/2.png").content == png(2)


def with_uploads(server: Server, slots: Slots) -> Slots:
    server.app.state.service = dataclasses.replace(server.app.state.service, uploads=slots)
    return slots


def test_pictures_hold_a_place_until_they_are_stored(
    settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, create, seen = score.read_submission, JobCreator.create, list[tuple[str, bool]]()
    with api_server(settings) as server, client_of(server) as client:
        uploads = with_uploads(server, Slots(1))._all

        def reading(*arguments: Any) -> list[bytes]:
            seen.append(("read", uploads.locked()))
            return read(*arguments)

        async def creating(creator: JobCreator, *asked: Any) -> str:
            seen.append(("create", uploads.locked()))
            return await create(creator, *asked)

        monkeypatch.setattr(score, "read_submission", reading)
        monkeypatch.setattr(JobCreator, "create", creating)
        asynchronous = {"prefer": "respond-async"}
        job_id = send(client, zipped(GOOD), asynchronous).json()["id"]
        alive.fail(job_id, "workers died")
        assert send(client, b"no zip").status_code == 422  # which gives its place back, too
        assert client.post(f"/jobs/{job_id}/retry", headers=asynchronous).status_code == 202
        assert client.post("/score/conditions", json={"conditions": LISTS}, headers=asynchronous).status_code == 202
        assert not uploads.locked()
    assert seen == [("read", True), ("create", True), ("read", True), ("create", True), ("create", False)]


def test_a_retry_without_uploads_does_not_wait_for_zips(settings: Settings, alive: JobStore) -> None:
    asynchronous = {"prefer": "respond-async"}
    with api_server(settings) as server, client_of(server) as client:
        job_id = client.post("/generate", json={"labels": [["red cube"]]}, headers=asynchronous).json()["id"]
        alive.fail(job_id, "workers died")
        with_uploads(server, Slots(0))  # all are taken
        assert client.post(f"/jobs/{job_id}/retry", headers=asynchronous, timeout=5).status_code == 202


def test_without_a_worker_no_zip_is_unpacked(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(score, "read_submission")
    problem(send(client, zipped(GOOD)), 503, "no-worker")


def test_pictures_of_any_size_are_judged_as_the_evaluator_judges_them(client: httpx.Client, working: Runner) -> None:
    pngs = [png(i, size=(40, 24)) for i in range(3)]
    result = send(client, zipped({f"{i}.png": one for i, one in enumerate(pngs)})).json()["result"]
    images = to_images(np.stack([read_png(one) for one in pngs]))
    (judge,) = working.models._judges.values()
    expected, names = judge.probabilities(images), judge.vocabulary.names
    for picture, probabilities in zip(result["pictures"], expected.tolist(), strict=True):
        for label, p in picture["scores"].items():
            assert p == pytest.approx(probabilities[names.index(label)], abs=1e-5)


def test_jobs_of_several_sizes_share_a_batch(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    later = {"prefer": "respond-async"}
    ids = []
    for size in ((16, 16), (40, 24)):
        pictures = zipped({f"{i}.png": png(i, size=size) for i in range(3)})
        ids.append(send(client, pictures, later).json()["id"])
    runner = Runner(alive.connection, settings, "w")
    for model in alive.wanted():
        runner.want(model)
    sizes = list[int]()
    while alive.statuses(ids)[ids[0]] != "finished":
        runner.run_once()
        sizes += [len(work.finished) for work in runner.storer.held]
    assert sizes[:1] == [6]
    assert [client.get(f"/jobs/{job_id}").json()["status"] for job_id in ids] == ["finished", "finished"]
    assert runner.rate.pictures == 0  # it measures sampling, not judging


def test_a_model_stays_loaded_beside_the_evaluator(connection: Redis, settings: Settings) -> None:
    runner = Runner(connection, settings.model_copy(update={"loaded_models": 1}), "w")
    toy = runner.models.load()
    info = read_info(resolve(settings.storage, None, "evaluator"))
    runner.models.want(ModelName(name=info.name, digest=info.digest, is_evaluator=True))
    while (judge := runner.models.get(info.digest)) is None:
        assert runner.models.follow() == []
    assert list(runner.models) == [toy, judge]
    assert isinstance(judge.engine, Uploads)
    assert [judge.engine.judge] == list(runner.models._judges.values())  # that of the model
    runner.models._unload()
    assert list(runner.models) == [toy, judge]


def test_the_job_is_queued_and_can_be_cancelled(client: httpx.Client, alive: JobStore) -> None:
    response = send(client, zipped(GOOD), {"prefer": "respond-async"})
    assert response.status_code == 202
    job = response.json()
    assert (job["status"], job["progress"], job["labels"]) == ("queued", {"done": 0, "total": 3}, LISTS)
    assert 'labelgrid_waiting_pictures{model="toy-evaluator"} 3.0' in client.get("/metrics").text
    assert client.delete(f"/jobs/{job['id']}").json()["status"] == "cancelled"
    assert 'labelgrid_waiting_pictures{model="toy-evaluator"} 0.0' in client.get("/metrics").text


def test_an_idempotency_key_stands_for_the_pictures_too(client: httpx.Client, alive: JobStore) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}
    first = send(client, zipped(GOOD), headers).json()["id"]
    again = zipped({f"other/{name}": content for name, content in GOOD.items()}, zipfile.ZIP_STORED)
    assert send(client, again, headers).json()["id"] == first
    problem(send(client, zipped({**GOOD, "1.png": png(9)}), headers), 422, "idempotency-key-reused")
    problem(client.post("/score", files={"file": TEST_FILE}, headers=headers), 422, "idempotency-key-reused")


def test_a_missing_uploaded_picture_fails_the_job(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    job_id = send(client, zipped(GOOD), {"prefer": "respond-async"}).json()["id"]
    (PictureFiles(settings.pictures).folder(job_id) / "1.png").unlink()
    runner = Runner(alive.connection, settings, "w")
    while alive.statuses([job_id])[job_id] in ACTIVE:
        runner.run_once()
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]) == (
        "failed",
        "picture 1: LookupError: the uploaded picture is no longer stored",
    )


def test_a_bad_zip_is_a_problem_that_names_every_entry(client: httpx.Client, alive: JobStore) -> None:
    body = problem(send(client, zipped({"0.png": b"x", "2.png": GOOD["2.png"]})), 422, "invalid-request")
    assert body["detail"] == "pictures.1.png: is missing"
    body = problem(send(client, zipped({**GOOD, "0.png": b"x", "2.png": b""})), 422, "invalid-request")
    assert [error["loc"] for error in body["errors"]] == [["body", "pictures", "0.png"], ["body", "pictures", "2.png"]]
    assert body["detail"] == "pictures.0.png: not a PNG"
    problem(send(client, b"no zip"), 422, "invalid-request")
    assert nothing_is_queued(alive.connection)


@given(st.one_of(st.binary(max_size=200), st.integers(0, len(ZIP)).map(lambda n: ZIP[:n] + ZIP[n + 3 :])))
def test_no_zip_causes_an_internal_error(session_client: httpx.Client, content: bytes) -> None:
    """Without a worker even a good zip is 503."""
    assert send(session_client, content).status_code in (422, 503)


@pytest.mark.parametrize("fields", [{"steps": "3"}, {"repeats": "2"}, {"seed": "1"}, {"repeats": "x"}])
def test_sampling_options_are_refused(client: httpx.Client, alive: JobStore, fields: dict[str, str]) -> None:
    body = problem(send(client, zipped(GOOD), **fields), 422, "invalid-request")
    assert body["errors"][0]["loc"] == ["body", next(iter(fields))]
    assert nothing_is_queued(alive.connection)


def test_pictures_without_a_test_file(client: httpx.Client, alive: JobStore) -> None:
    body = problem(client.post("/score", files={"pictures": ("a.zip", zipped(GOOD))}), 422, "invalid-request")
    assert body["detail"] == "file: Field required"


def test_the_client_uploads_a_zip_or_a_folder(client: httpx.Client, working: Runner, tmp_path: Path) -> None:
    for name, content in GOOD.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("not sent")
    archive = tmp_path / "submission.zip"
    archive.write_bytes(zipped(GOOD))
    with Client(str(client.base_url)) as caller:
        jobs = [caller.score(LISTS, pictures=given) for given in (zipped(GOOD), archive, tmp_path, str(archive))]
    assert all(job.seed is None for job in jobs)
    accuracies = [job.result.accuracy for job in jobs if job.result is not None]
    assert accuracies == accuracies[:1] * 4
    assert [text(raw) for raw in working.connection.zrange("labelgrid:deadlines", 0, -1)] == []


def test_the_command_line_uploads_pictures(client: httpx.Client, working: Runner, tmp_path: Path) -> None:
    file, archive, grid = tmp_path / "test.json", tmp_path / "submission.zip", tmp_path / "grid.png"
    file.write_text(TEST_FILE[1])
    archive.write_bytes(zipped(GOOD))
    line = ["score", str(file), "--pictures", str(archive), "-o", str(grid), "--url", str(client.base_url)]
    done = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
    assert (done.exit_code, done.stderr) == (0, "")
    assert "scored by toy-evaluator" in done.stdout
    assert "gray cylinder (0." in done.stdout
    assert check_picture(grid.read_bytes(), 512)
    archive.write_bytes(zipped(without("1.png")))
    done = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
    assert (done.exit_code, done.stderr) == (1, "labelgrid: pictures.1.png: is missing\n")
