"""POST /score, of repeated runs over a test file, equal to the trainer's, and of uploaded pictures."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from redis import Redis
from redis.exceptions import ConnectionError
from typer.testing import CliRunner

from service.api.results import Slots
from service.api.routes import score
from service.api.uploads import Upload, check_picture
from service.client import Client
from service.client.__main__ import app
from service.contract.options import PictureOptions
from service.files import PictureFiles, picture_name
from service.settings import Settings
from service.store import keys
from service.store.async_jobs import AsyncJobs
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.options import picture_seed
from shared.pictures import marked_grid, read_png
from shared.registry import resolve
from tests.conftest import api_server, client_of, running
from tests.service.api.answers import LISTS, nothing_is_queued, problem, scoring
from tests.service.api.uploads.zips import GOOD, TEST_FILE, png, zipped
from tests.service.api.uploads.zips import LISTS as THREE
from tests.service.processes import until
from trainer.score import best, score_run, summary


def test_a_score_is_of_several_runs(client: httpx.Client, working: Runner) -> None:
    result = client.post("/score", **scoring(LISTS, repeats=3, seed=5, steps=3, model="toy")).json()["result"]
    assert [repeat["seed"] for repeat in result["repeats"]] == [5, 6, 7]
    for name in ("accuracy", "exact_match", "f1"):
        values = [repeat[name] for repeat in result["repeats"]]
        expected = {"max": max(values), "mean": np.mean(values), "std": np.std(values)}
        assert result[name] == pytest.approx(expected)
    shown = [picture["seed"] for picture in result["pictures"]]
    assert shown == [picture_seed(5 + result["best"], i) for i in range(2)]


def test_score_gives_what_the_trainer_gives(client: httpx.Client, working: Runner, settings: Settings) -> None:
    asked = scoring(LISTS * 4, repeats=3, seed=5, steps=6, guidance=3.0)
    result = client.post("/score", **asked).json()["result"]
    denoiser = load_denoiser(resolve(settings.storage, None, "denoiser"))
    evaluator = load_evaluator(resolve(settings.storage, None, "evaluator"))
    options = PictureOptions(steps=6, guidance=3.0)
    stepper = denoiser.stepper()
    runs = [score_run(stepper, evaluator, LISTS * 4, options, 5 + r) for r in range(3)]
    figures = summary(runs)
    for name in ("accuracy", "exact_match", "f1"):
        assert result[name] == pytest.approx(figures[name])
        assert [repeat[name] for repeat in result["repeats"]] == pytest.approx([run[name] for run in figures["runs"]])
    assert result["repeats"][result["best"]]["seed"] == best(runs).seed


def test_a_single_picture_is_its_own_grid_and_is_stored_once(client: httpx.Client, working: Runner) -> None:
    asked = client.post("/score", **scoring([["red cube"]], repeats=3, steps=2)).json()
    picture = client.get(asked["result"]["pictures"][0]["url"])
    assert client.get(asked["result"]["grid_url"]).content == picture.content
    assert asked["result"]["pictures"][0]["url"].endswith(f"/{asked['result']['best']}.png")
    folder = PictureFiles(working.settings.pictures).folder(asked["id"])
    assert isinstance(folder, Path)
    assert {file.name for file in folder.iterdir()} == {"0.png", "1.png", "2.png"}


ZIP = zipped({"0.png": png(0), "1.png": png(1)}, zipfile.ZIP_STORED)


def send(client: httpx.Client, pictures: bytes, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    files = {"file": TEST_FILE, "pictures": ("submission.zip", pictures)}
    return client.post("/score", files=files, data=fields, headers=headers)


def test_sampled_pictures_get_the_same_scores_when_uploaded(client: httpx.Client, working: Runner) -> None:
    sampled = client.post("/score", **scoring(THREE, repeats=1, steps=3, seed=5)).json()["result"]
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


def test_uploads_stay_if_redis_breaks_after_it_has_created_their_job(
    client: httpx.Client, alive: JobStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, headers = AsyncJobs.create, {"prefer": "respond-async", "idempotency-key": "mine"}

    async def breaking(jobs: AsyncJobs, *asked: Any) -> str:
        await create(jobs, *asked)
        raise ConnectionError("before the answer")

    with monkeypatch.context() as patch:
        patch.setattr(AsyncJobs, "create", breaking)
        problem(send(client, zipped(GOOD), headers), 503, "unavailable")
    job_id = send(client, zipped(GOOD), headers).json()["id"]
    assert PictureFiles(settings.pictures).read(job_id, picture_name(2)) == png(2)


@pytest.mark.parametrize(("error", "status"), [(OSError(), 503), (OverflowError(), 500)])
def test_nothing_stays_of_pictures_of_which_one_cannot_be_stored(
    settings: Settings,
    alive: JobStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
) -> None:
    write = PictureFiles.write

    def failing(files: PictureFiles, job_id: str, name: str, content: bytes) -> None:
        if name == picture_name(1):
            raise error
        write(files, job_id, name, content)

    monkeypatch.setattr(PictureFiles, "write", failing)
    own = settings.model_copy(update={"pictures": tmp_path})
    with api_server(own) as server, client_of(server) as client:
        assert send(client, zipped(GOOD), {"prefer": "wait=0"}).status_code == status
    assert list(tmp_path.rglob("*.png")) == []


def test_nothing_stays_of_pictures_that_get_no_job(settings: Settings, alive: JobStore, tmp_path: Path) -> None:
    own, headers = settings.model_copy(update={"max_queued_pictures": 5, "pictures": tmp_path}), {"prefer": "wait=0"}
    with api_server(own) as server, client_of(server) as client:
        job_id = send(client, zipped(GOOD), headers).json()["id"]
        problem(send(client, zipped(GOOD), headers), 429, "queue-full")
        alive.cancel(job_id)
        (first, *others) = tmp_path.rglob("*.png")
        first.unlink()
        problem(client.post(f"/jobs/{job_id}/retry"), 410, "expired-job")
    assert len(others) == 2
    assert {*tmp_path.rglob("*.png")} == {*others}


def test_few_zips_are_checked_at_the_same_time(
    settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = score.read_submission, list[bool]()
    with api_server(settings) as server, client_of(server) as client:
        uploads = Slots(1)
        server.app.state.service = dataclasses.replace(server.app.state.service, uploads=uploads)

        def reading(*arguments: Any) -> list[Upload]:
            seen.append(uploads._all.locked())
            return read(*arguments)

        monkeypatch.setattr(score, "read_submission", reading)
        assert send(client, b"no zip").status_code == 422  # which gives its place back, too
        assert send(client, zipped(GOOD), {"prefer": "respond-async"}).status_code == 202
        assert not uploads._all.locked()
    assert seen == [True, True]


def test_without_a_worker_no_zip_is_unpacked(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(score, "read_submission")
    problem(send(client, zipped(GOOD)), 503, "no-worker")


def test_an_idempotency_key_stands_for_the_pictures_too(client: httpx.Client, alive: JobStore) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}
    first = send(client, zipped(GOOD), headers).json()["id"]
    again = zipped({f"other/{name}": content for name, content in GOOD.items()}, zipfile.ZIP_STORED)
    assert send(client, again, headers).json()["id"] == first
    problem(send(client, zipped({**GOOD, "1.png": png(9)}), headers), 422, "idempotency-key-reused")
    problem(client.post("/score", files={"file": TEST_FILE}, headers=headers), 422, "idempotency-key-reused")


def test_a_bad_zip_is_a_problem_that_names_every_entry(client: httpx.Client, alive: JobStore) -> None:
    body = problem(send(client, zipped({**GOOD, "0.png": b"x", "2.png": b""})), 422, "invalid-request")
    assert [error["loc"] for error in body["errors"]] == [["body", "pictures", "0.png"], ["body", "pictures", "2.png"]]
    assert body["detail"] == "pictures.0.png: not a PNG"
    problem(send(client, b"no zip"), 422, "invalid-request")
    assert nothing_is_queued(alive.connection)


def test_uploaded_pictures_may_have_a_deadline(client: httpx.Client, alive: JobStore) -> None:
    answer = send(client, zipped(GOOD), {"prefer": "respond-async"}, deadline_s="0.01")
    until(lambda: alive.fail_overdue() or client.get(f"/jobs/{answer.json()['id']}").json()["reason"] == "deadline")


@pytest.mark.parametrize("fields", [{"steps": "3"}, {"repeats": "2"}])
def test_sampling_options_are_refused(client: httpx.Client, alive: JobStore, fields: dict[str, str]) -> None:
    body = problem(send(client, zipped(GOOD), **fields), 422, "invalid-request")
    assert body["errors"][0]["loc"] == ["body", next(iter(fields))]
    assert nothing_is_queued(alive.connection)


def test_the_client_uploads_a_zip_or_a_folder(client: httpx.Client, working: Runner, tmp_path: Path) -> None:
    for name, content in GOOD.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("not sent")
    archive = tmp_path / "submission.zip"
    archive.write_bytes(zipped(GOOD))
    with Client(str(client.base_url)) as caller:
        jobs = [caller.score(THREE, pictures=given) for given in (zipped(GOOD), archive, tmp_path, str(archive))]
    assert all(job.seed is None for job in jobs)
    accuracies = [job.result.accuracy for job in jobs if job.result is not None]
    assert accuracies == accuracies[:1] * 4


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


def test_reading_a_score_reads_the_verdicts_of_its_best_repeat_and_worst_pictures_only(
    client: httpx.Client, working: Runner
) -> None:
    """Of thirty pictures of noise none is as asked, and twenty are the worst."""
    job = client.post("/score", **scoring(LISTS, repeats=15, seed=5, steps=1)).json()
    shown = {picture["url"] for picture in job["result"]["pictures"] + job["result"]["worst"]}
    assert len(job["result"]["worst"]) == 20
    every = {i: f"/jobs/{job['id']}/images/{i}.png" for i in range(15 * len(LISTS))}
    others = {str(i): "no verdict" for i, url in every.items() if url not in shown}
    assert others
    working.store.connection.hset(keys.verdicts(job["id"]), mapping=others)
    assert client.get(f"/jobs/{job['id']}").json() == job
