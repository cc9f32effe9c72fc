"""Uploaded pictures: judged together whatever their sizes, and one that cannot be judged fails alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from redis import Redis
from torch import Tensor

from service.contract.records import FinishedPicture, JobRecord, Picture
from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from service.worker.engine import Failed, Outcome
from service.worker.runner import Runner
from service.worker.uploaded import JUDGED_TOGETHER, judge_uploaded
from shared.pictures import marked_grid, read_png
from tests.service.store.helpers import record
from tests.service.worker.conftest import status, verdicts_of
from tests.service.worker.test_engine import CPU, NAMES, ToyJudge, picture


def png(red: int, size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(content, "PNG")
    return content.getvalue()


def upload(connection: Redis, pngs: list[bytes | None]) -> list[Picture]:
    """Store PNGs as those of job `a`; None stands for one that has expired."""
    for i, content in enumerate(pngs):
        if content is not None:
            connection.hset(keys.png("a"), str(i), content)
    return [picture(i) for i in range(len(pngs))]


class PickyJudge(ToyJudge):
    """Raises `error` for a batch with a picture of full red."""

    error: Exception = RuntimeError("too red")

    def probabilities(self, images: Tensor) -> Tensor:
        result = super().probabilities(images)
        if images[:, 0].amax() > 0.99:
            raise self.error
        return result


def by_index(outcomes: list[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda outcome: outcome.picture.index)


def test_pictures_of_several_sizes_are_judged_in_one_call(connection: Redis) -> None:
    judge, pngs = ToyJudge(), [png(0), png(100, (40, 24)), png(200, (64, 64))]
    outcomes = judge_uploaded(connection, judge, upload(connection, list(pngs)), CPU)
    assert judge.calls == 1
    for i, (outcome, content) in enumerate(zip(by_index(outcomes), pngs, strict=True)):
        assert isinstance(outcome, FinishedPicture)
        assert (outcome.png, outcome.trajectory, outcome.verdict.index) == (b"", None, i)  # Redis has the PNG
        red = np.asarray(Image.open(io.BytesIO(content)), dtype=np.float32)[..., 0].mean() / 127.5 - 1
        features = torch.tensor([red, -1.0, -1.0, red - 2.0])
        expected = dict(zip(NAMES, torch.sigmoid(5 * features).tolist(), strict=True))
        assert outcome.verdict.probabilities == pytest.approx(expected, abs=1e-4)


def test_pictures_that_are_missing_or_unreadable_fail_alone(connection: Redis) -> None:
    first, missing, junk, last = by_index(
        judge_uploaded(connection, ToyJudge(), upload(connection, [png(1), None, b"junk", png(2)]), CPU)
    )
    assert isinstance(first, FinishedPicture)
    assert isinstance(last, FinishedPicture)
    assert missing == Failed(picture(1), "LookupError: the uploaded picture is no longer stored")
    assert isinstance(junk, Failed)
    assert junk.reason.startswith("UnidentifiedImageError: ")


def test_a_picture_that_cannot_be_judged_fails_alone(connection: Redis) -> None:
    pictures, judge = upload(connection, [png(1), png(255), png(2)]), PickyJudge()
    first, red, last = by_index(judge_uploaded(connection, judge, pictures, CPU))
    assert red == Failed(picture(1), "RuntimeError: too red")
    assert isinstance(first, FinishedPicture)
    assert isinstance(last, FinishedPicture)
    assert judge.calls == 4  # all together, then each alone
    unknown = picture(0, labels=["pink cube"])
    (failed,) = judge_uploaded(connection, judge, [unknown], CPU)
    assert isinstance(failed, Failed)
    assert "pink cube" in failed.reason


def test_a_failed_device_is_blamed_on_no_picture(connection: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = PickyJudge()
    judge.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr("service.worker.uploaded.lost", lambda error, device: error is judge.error)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        judge_uploaded(connection, judge, upload(connection, [png(1), png(255)]), CPU)


def test_without_pictures_there_is_nothing_to_judge(connection: Redis) -> None:
    judge = ToyJudge()
    assert judge_uploaded(connection, judge, [], CPU) == []
    (failed,) = judge_uploaded(connection, judge, upload(connection, [None]), CPU)
    assert isinstance(failed, Failed)
    assert judge.calls == 0


# In a runner.


def create_upload(runner: Runner, count: int) -> JobRecord:
    assert runner.models.judged_by is not None
    model, digest = runner.models.judged_by.name, runner.models.judged_by.digest
    job = record(count, id=f"{count}-pictures", kind="score", created_at=0, model=model, digest=digest, sent=True)
    runner.store.create(job, uploaded=[png(i) for i in range(count)])
    return job


def test_a_job_larger_than_a_batch_is_judged_completely(runner: Runner, store: JobStore) -> None:
    job = create_upload(runner, JUDGED_TOGETHER + 3)
    runner.run(job.id)
    assert status(store, job) == "finished"
    assert [verdict.index for verdict in verdicts_of(store, job)] == list(range(job.total))
    assert runner.connection.xlen(keys.stream(job.digest)) == 0
    assert not runner.models.busy


def test_a_single_upload_has_a_grid_that_marks_it(runner: Runner, store: JobStore) -> None:
    job = create_upload(runner, 1)
    runner.run(job.id)
    (verdict,), stored = verdicts_of(store, job), store.all_pngs(job.id)
    assert np.array_equal(read_png(stored["grid"]), marked_grid(read_png(stored["0"])[None], [verdict.exact], 1))


def test_a_cancelled_jobs_uploads_are_not_judged(runner: Runner, store: JobStore) -> None:
    cancelled, other = create_upload(runner, 40), create_upload(runner, 2)
    store.cancel(cancelled.id)
    runner.run(other.id)
    assert [status(store, job) for job in (cancelled, other)] == ["cancelled", "finished"]
    assert verdicts_of(store, cancelled) == []
    assert runner.connection.xlen(keys.stream(other.digest)) == 0


def test_uploads_that_a_dead_worker_claimed_are_judged_by_another(
    runner: Runner, store: JobStore, connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = Runner(connection, settings.model_copy(update={"lease_s": 0.2}), "w2")
    job = create_upload(runner, 3)

    class Death(BaseException):
        pass

    def die(*_: object) -> None:
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr("service.worker.runner.judge_uploaded", die)
        with pytest.raises(Death):
            runner.run(job.id)
    (evaluator,) = [loaded for loaded in runner.models if loaded.digest == job.digest]
    assert len(evaluator.claims) == 3
    quick.run(job.id)
    assert status(store, job) == "finished"


def test_an_upload_that_kills_workers_is_tried_alone_and_fails_only_its_job(
    connection: Redis, settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = settings.model_copy(update={"lease_s": 0.2})
    batches = list[list[str]]()

    class Death(BaseException):
        pass

    def judge(connection: Redis, judge: ToyJudge, pictures: list[Picture], device: torch.device) -> list[Outcome]:
        batches.append([f"{one.job}/{one.index}" for one in pictures])
        if any(one.job == "1-pictures" for one in pictures):
            raise Death
        return judge_uploaded(connection, judge, pictures, device)

    monkeypatch.setattr("service.worker.runner.judge_uploaded", judge)
    first = Runner(connection, quick, "w0")
    bad, good = create_upload(first, 1), create_upload(first, 2)
    deaths = 0
    for runner in (first, *(Runner(connection, quick, f"w{i}") for i in range(1, 6))):
        try:
            runner.run(bad.id)
            runner.run(good.id)
            break
        except Death:
            deaths += 1
    assert deaths == 4
    assert [status(store, job) for job in (bad, good)] == ["failed", "finished"]
    assert batches.count(["1-pictures/0"]) == 1  # the last try
    assert connection.hget(keys.job(bad.id), "error") == b"workers died 4 times while sampling picture 0"
