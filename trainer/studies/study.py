"""What a study is: a measurement that says more about a denoiser than its scores. `trainer evaluate` runs them.

A study is an entry of STUDIES and a module, whose `run` measures a Subject and returns a Report.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from rich.progress import Progress
from torch import Tensor

from shared.diffusion.denoise import Stepper, finish
from shared.diffusion.model import Denoiser, load_denoiser
from shared.evaluator import Evaluator
from shared.options import SamplingOptions
from shared.storage import Location
from trainer.data import Dataset, check_labelled, in_vocabulary, read_folders
from trainer.data_folder import Pictures, find_pictures
from trainer.plugins import Study, plugins
from trainer.score import evaluator_path, make_options, open_evaluator


@dataclass
class Subject:
    """A checkpoint, with what `trainer evaluate` was given to study it. Whatever is loaded is loaded once."""

    storage: Location
    path: Location
    device: torch.device
    progress: Progress
    data: list[Path] = field(default_factory=list)
    trained_on: list[Path] = field(default_factory=list)
    evaluator: str | None = None
    preset: str = "default"
    count: int | None = None
    seed: int = 0
    objects: list[int] = field(default_factory=list)
    noise: float = 0.0
    upsampler_alone: bool = False
    around: str | None = None
    longer: int = 1
    second: str | None = None
    attempts: int = 8

    @cached_property
    def denoiser(self) -> Denoiser:
        return load_denoiser(self.path, device=self.device)

    @cached_property
    def options(self) -> SamplingOptions:
        return make_options(self.preset, {}, self.denoiser.info)

    @cached_property
    def judge(self) -> Evaluator:
        """The evaluator that was named, or the one that judges the denoiser."""
        return open_evaluator(evaluator_path(self.storage, self.evaluator, self.denoiser.info), self.device)

    @cached_property
    def dataset(self) -> Dataset:
        """The pictures of `data`, at the size that the network samples."""
        return self.read(self.data)

    @cached_property
    def pictures(self) -> Pictures:
        """The same pictures at the size of the denoiser's finished ones."""
        _, height, width = self.denoiser.picture_shape
        return find_pictures(self.data, f"{width}x{height}")

    def read(self, folders: Sequence[Path]) -> Dataset:
        size = self.denoiser.image_shape[-1]
        dataset = read_folders(folders, self.progress, size=size, fit=self.denoiser.fit)
        dataset = in_vocabulary(dataset, self.denoiser.vocabulary, self.denoiser.info.name)
        check_labelled(dataset, "pictures")
        return dataset

    @cached_property
    def stepper(self) -> Stepper:
        return self.denoiser.stepper()

    def sample(self, labels: Tensor, seeds: Sequence[int], positions: Tensor | None = None) -> Tensor:
        """Sample a picture for each of `labels` (N, K), at `positions` (N, K, 2) if given, with a progress bar."""
        advance = self.advance("sampling (pictures x steps)", len(labels) * self.options.steps)
        places = None if positions is None else list(positions)
        rows = self.stepper.new_rows(labels, [self.options] * len(labels), seeds, places)
        return finish(self.stepper, rows, lambda rows: advance(len(rows)))

    def advance(self, what: str, total: int | None = None) -> Callable[[int], None]:
        """Show a progress bar; return what moves it."""
        task = self.progress.add_task(what, total=total)
        return lambda n: self.progress.advance(task, n)


@dataclass(frozen=True)
class Report:
    """What a study found: rows of named figures, for a table and for JSON, and a picture."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] = field(default_factory=dict)  # figures of the whole, for JSON
    png: bytes | None = None


STUDIES: Final = {
    "coverage": Study("trainer.studies.coverage"),
    "spectrum": Study("trainer.studies.spectrum"),
    "two-sample": Study("trainer.studies.two_sample"),
    "arrangements": Study("trainer.studies.arrangements"),
    "selection": Study("trainer.studies.selection", ("second",)),
    **plugins().studies,
}


def run(name: str, subject: Subject) -> Report:
    """Run a study, whose module is loaded only now. TrainerError if the subject or its data do not suit it."""
    report: Report = importlib.import_module(STUDIES[name].module).run(subject)
    return report
