"""Runners that a test drives step by step, and jobs for them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from redis import Redis

from service.contract.records import JobRecord, Verdict
from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore, read_verdicts
from service.worker.models import LoadedModel
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.diffusion.denoise import Row
from shared.options import SamplingOptions
from shared.registry import resolve
from tests.service.store.helpers import record
from tests.toy_checkpoint import publish_toys

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
QUICK = SamplingOptions(steps=4)


@pytest.fixture
def runner(connection: Redis, settings: Settings) -> Runner:
    one = Runner(connection, settings, "w1")
    one.models.load()
    return one


@pytest.fixture
def create(store: JobStore, settings: Settings) -> Callable[..., JobRecord]:
    def create(
        labels: Sequence[Sequence[str]] = LISTS,
        *,
        seed: int = 7,
        repeats: int = 1,
        options: SamplingOptions = QUICK,
        model: str = "toy",
        digest: str | None = None,
    ) -> JobRecord:
        found = digest or read_info(resolve(settings.storage, model, "denoiser")).digest
        kind, lists = "generate" if repeats == 1 else "score", [list(one) for one in labels]
        job = record(
            kind=kind, model=model, digest=found, labels=lists, seed=seed, repeats=repeats, columns=2, options=options
        )
        store.create(job)
        return job

    return create


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish_toys(tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def own(settings: Settings, folder: Path, tmp_path: Path) -> Settings:
    """Settings with the test's own storage and cache; storage is checked in every iteration."""
    return settings.model_copy(update={"storage": folder, "cache": tmp_path / "cache", "storage_every_s": 0.0})


class Counting:
    """Records how many pictures each step has."""

    def __init__(self, model: LoadedModel) -> None:
        self.inner, self.batches = model.engine.stepper, list[int]()
        self.device, self.picture_shape, self.pictures = (
            self.inner.device,
            self.inner.picture_shape,
            self.inner.pictures,
        )
        model.engine.stepper = self

    def new_row(
        self, labels: Sequence[float], options: SamplingOptions, seed: int, positions: torch.Tensor | None = None
    ) -> Row:
        return self.inner.new_row(labels, options, seed, positions)

    def step(self, rows: Sequence[Row]) -> None:
        self.batches.append(len(rows))
        self.inner.step(rows)


def status(store: JobStore, job: JobRecord) -> str | None:
    return store.statuses([job.id])[job.id]


def verdicts_of(store: JobStore, job: JobRecord) -> list[Verdict]:
    return read_verdicts(store.connection.hvals(keys.verdicts(job.id)))
