"""Runners that a test drives step by step, and jobs for them."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from redis import Redis

from service.contract.options import PictureOptions
from service.contract.records import JobRecord, ModelName, Verdict
from service.files import GRID, PictureFiles, picture_name
from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from service.worker.engine import Engine
from service.worker.models import Loaded
from service.worker.runner import Runner
from shared.checkpoint import CheckpointInfo, read_info
from shared.diffusion.denoise import Row
from shared.registry import resolve
from tests.service.processes import until
from tests.service.store.helpers import add_job, record, statuses
from tests.toy_checkpoint import publish_toys

Create = Callable[..., JobRecord]

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
ONE_STEP, QUICK, LONG = (PictureOptions(steps=steps) for steps in (1, 4, 1000))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker look in every iteration, and load a model at once."""
    for name in ("CHECK_EVERY_S", "OTHERS_FIRST_S"):
        monkeypatch.setattr(f"service.worker.runner.{name}", 0.0)


@pytest.fixture
def runner(connection: Redis, settings: Settings) -> Runner:
    return started(connection, settings)


@pytest.fixture
def create(store: JobStore) -> Create:
    def create(
        labels: Sequence[Sequence[str]] = LISTS,
        *,
        seed: int = 7,
        repeats: int = 1,
        options: PictureOptions = QUICK,
        model: str = "toy",
        digest: str | None = None,
        trajectory: int | None = None,
    ) -> JobRecord:
        found = digest or read_info(resolve(store.settings.storage, model, "denoiser")).digest
        kind, lists = "generate" if repeats == 1 else "score", [list(one) for one in labels]
        about = {"kind": kind, "model": model, "digest": found, "labels": lists, "seed": seed, "repeats": repeats}
        job = record(**about, columns=2, options=options, trajectory=trajectory)
        add_job(store, job)
        return job

    return create


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish_toys(tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def own(settings: Settings, folder: Path, tmp_path: Path) -> Settings:
    """Settings with the test's own storage and cache."""
    return settings.model_copy(update={"storage": folder, "cache": tmp_path / "cache"})


def started(connection: Redis, settings: Settings, name: str = "w1") -> Runner:
    """Return a runner that has loaded the promoted model."""
    one = Runner(connection, settings, name)
    one.models.load()
    return one


def run_until(runner: Runner, condition: Callable[[], object]) -> None:
    """Run iterations until the condition is true."""

    def is_true() -> object:
        runner.run_once()
        return condition()

    until(is_true, every_s=0)


def run(runner: Runner, *job_ids: str) -> None:
    """Run iterations until the jobs have ended."""
    run_until(runner, lambda: runner.store.ended(job_ids) == set(job_ids))


def settle(runner: Runner) -> None:
    """Run iterations until nothing is in progress."""
    run_until(runner, lambda: not runner.busy)


def model_of(runner: Runner) -> Loaded:
    """Return the denoiser that was loaded first."""
    return runner.models.denoisers()[0][0]


def engine_of(runner: Runner) -> Engine:
    return runner.models.denoisers()[0][1]


def load(runner: Runner, info: CheckpointInfo) -> Loaded:
    """Load another denoiser."""
    runner.models.want(ModelName(name=info.name, digest=info.digest))

    def find() -> Loaded | None:
        runner.models.follow(lambda *why: pytest.fail(str(why)))
        return runner.models.get(info.digest)

    return until(find)


class Death(BaseException):
    """Takes the place of the death of a process."""


def die(*_: object) -> None:
    raise Death


def png(red: int, size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(content, "PNG")
    return content.getvalue()


def create_upload(runner: Runner, count: int) -> JobRecord:
    """Create a job of uploaded pictures."""
    judge = model_of(runner).judged_by
    assert judge is not None
    job = record(count, kind="score", model=judge.name, digest=judge.digest, uploaded=True)
    for i in range(count):
        runner.storage.files.write(job.id, picture_name(i), png(i))
    add_job(runner.store, job)
    return job


def batches_of(engine: Engine, deadly: BaseException | None = None) -> list[int]:
    """Return a list of how many pictures each step has, which grows. `deadly`: raised where one has the first label."""
    step, batches = engine.stepper.step, list[int]()

    def counted(rows: Sequence[Row]) -> None:
        if deadly is not None and any(row.labels[0] for row in rows):
            raise deadly
        batches.append(len(rows))
        step(rows)

    engine.stepper.step = counted  # type: ignore[method-assign]
    return batches


def status(store: JobStore, job: JobRecord) -> str:
    return statuses(store, job.id)[0]


def error_of(store: JobStore, job: JobRecord) -> str:
    """Return why a job failed."""
    assert status(store, job) == "failed"
    return store.connection.hget(keys.job(job.id), "error") or ""


def verdicts_of(store: JobStore, job: JobRecord) -> list[Verdict]:
    verdicts = map(Verdict.model_validate_json, store.connection.hvals(keys.verdicts(job.id)))
    return sorted(verdicts, key=lambda verdict: verdict.index)


def pngs(store: JobStore, job_id: str, indices: Iterable[int]) -> list[bytes]:
    files = PictureFiles(store.settings.pictures)
    return [files.read(job_id, picture_name(index)) for index in indices]


def grid_of(store: JobStore, job_id: str) -> bytes:
    return PictureFiles(store.settings.pictures).read(job_id, GRID)
