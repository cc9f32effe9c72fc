"""Uploaded pictures are judged together; one that cannot be judged fails alone."""

import io
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from service.contract.records import FinishedPicture, JobRecord
from service.files import PictureFiles, picture_name
from service.store import keys
from service.store.jobs import JobStore
from service.worker.job_files import JobFiles
from service.worker.judge import JUDGED_TOGETHER, Failed, Outcome, Uploads
from service.worker.runner import Runner
from shared.pictures import marked_grid, read_png
from tests.service.worker.conftest import (
    create_upload,
    error_of,
    grid_of,
    png,
    pngs,
    run,
    run_until,
    settle,
    status,
    verdicts_of,
)
from tests.service.worker.test_engine import NAMES, ToyJudge, picture


def judged(folder: Path, judge: ToyJudge, *pngs: bytes | None) -> list[Outcome]:
    """Return the outcomes of pictures of job `a`, in order."""
    uploads, pictures = (
        Uploads(judge, JobFiles(PictureFiles(folder), 60.0), torch.device("cpu")),
        [picture(i) for i in range(len(pngs))],
    )
    for one, content in zip(pictures, pngs, strict=True):
        if content is not None:
            uploads.files.files.write(one.job, picture_name(one.index), content)
    uploads.admit(pictures)
    wait([read for _, read in uploads._reads.values()])
    return sorted(uploads.step(), key=lambda outcome: outcome.picture.index)


class PickyJudge(ToyJudge):
    """Raises for a batch with a picture of full red."""

    def probabilities(self, images: Tensor) -> Tensor:
        result = super().probabilities(images)
        if images[:, 0].amax() > 0.99:
            raise RuntimeError("too red")
        return result


def test_pictures_of_several_sizes_are_judged_in_one_call(tmp_path: Path) -> None:
    judge, pngs = ToyJudge(), [png(0), png(100, (40, 24)), png(200, (64, 64))]
    outcomes = judged(tmp_path, judge, *pngs)
    assert judge.calls == 1
    for i, (outcome, content) in enumerate(zip(outcomes, pngs, strict=True)):
        assert isinstance(outcome, FinishedPicture)
        assert (outcome.png, outcome.trajectory, outcome.verdict.index) == (b"", None, i)  # storage has the PNG
        red = np.asarray(Image.open(io.BytesIO(content)), dtype=np.float32)[..., 0].mean() / 127.5 - 1
        features = torch.tensor([red, -1.0, -1.0, red - 2.0])
        expected = dict(zip(NAMES, torch.sigmoid(5 * features).tolist(), strict=True))
        assert outcome.verdict.probabilities == pytest.approx(expected, abs=1e-4)


def test_pictures_that_are_missing_or_unreadable_fail_alone(tmp_path: Path) -> None:
    first, missing, junk, last = judged(tmp_path, ToyJudge(), png(1), None, b"junk", png(2))
    assert isinstance(first, FinishedPicture)
    assert isinstance(last, FinishedPicture)
    assert missing == Failed(picture(1), "LookupError: it is no longer in storage")
    assert isinstance(junk, Failed)
    assert junk.reason.startswith("ValueError: it is damaged: ")


def test_a_picture_that_cannot_be_judged_fails_alone(tmp_path: Path) -> None:
    judge = PickyJudge()
    first, red, last = judged(tmp_path, judge, png(1), png(255), png(2))
    assert red == Failed(picture(1), "RuntimeError: too red")
    assert isinstance(first, FinishedPicture)
    assert isinstance(last, FinishedPicture)
    assert judge.calls == 5  # all together, then in halves


# In a runner.


def test_a_job_larger_than_a_batch_is_judged_completely(runner: Runner, store: JobStore) -> None:
    job = create_upload(runner, JUDGED_TOGETHER + 3)
    run(runner, job.id)
    assert status(store, job) == "finished"
    assert [verdict.index for verdict in verdicts_of(store, job)] == list(range(job.total))
    settle(runner)
    assert runner.connection.xlen(keys.pictures(job.digest)) == 0


def test_a_single_upload_has_a_grid_that_marks_it(runner: Runner, store: JobStore) -> None:
    job = create_upload(runner, 1)
    run(runner, job.id)
    (verdict,), (stored,) = verdicts_of(store, job), pngs(store, job.id, [0])
    grid = marked_grid(read_png(stored)[None], [verdict.exact], 1)
    assert np.array_equal(read_png(grid_of(store, job.id)), grid)


def test_while_storage_cannot_be_read_uploads_wait_but_those_of_a_cancelled_job(
    runner: Runner, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, cancelled = (create_upload(runner, 2) for _ in range(2))
    read, is_back = runner.storage.files.read, list[int]()

    def failing(job_id: str, name: str) -> bytes:
        if not is_back:
            raise OSError("storage is away")
        return read(job_id, name)

    monkeypatch.setattr("service.worker.job_files.RETRY_S", 0.01)
    monkeypatch.setattr(runner.storage.files, "read", failing)
    run_until(runner, lambda: runner.storage.problem)
    assert runner.storage.problem == "OSError: storage is away"
    store.cancel(cancelled.id)
    runner.run_once()
    assert {job for loaded in runner.models for job, _ in loaded.claims} == {late.id}
    is_back.append(1)
    run(runner, late.id)
    assert status(store, late) == "finished"
    settle(runner)


def test_an_upload_that_alone_cannot_be_read_fails_and_others_are_judged_meanwhile(
    runner: Runner, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, read, others = create_upload(runner, 2), runner.storage.files.read, list[JobRecord]()

    def failing(job_id: str, name: str) -> bytes:
        if (job_id, name) == (bad.id, "1.png"):
            raise PermissionError(13, "Permission denied", name)
        return read(job_id, name)

    monkeypatch.setattr("service.worker.job_files.RETRY_S", 0.01)
    monkeypatch.setattr(runner.storage.files, "read", failing)
    while not store.ended([bad.id]):
        others.append(create_upload(runner, 1))
        runner.run_once()
    run(runner, *(job.id for job in others))
    assert error_of(store, bad) == "picture 1: PermissionError: Permission denied"
    assert {status(store, job) for job in others} == {"finished"}
    assert runner.storage.problem == ""


def test_a_failed_device_is_blamed_on_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, failure = PickyJudge(), torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def fail(images: torch.Tensor) -> torch.Tensor:
        raise failure

    monkeypatch.setattr(judge, "probabilities", fail)
    monkeypatch.setattr("service.worker.judge.lost", lambda error, device: error is failure)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        judged(tmp_path, judge, png(1), png(255))
