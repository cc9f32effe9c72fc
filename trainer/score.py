"""Scores a denoiser on label lists: a checkpoint on a test file, or a network while it trains.

Picture i of run r has the seed picture_seed(seed + r, i), so the service's POST /score gives the same pictures.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Final, cast

import torch
from rich.progress import Progress
from torch import Tensor, nn

from shared import storage as files
from shared.checkpoint import CheckpointInfo
from shared.device import autocast_dtype
from shared.diffusion.denoise import Row, Stepper, sample
from shared.diffusion.layouts import Layouts
from shared.diffusion.model import Denoiser, make_stepper
from shared.diffusion.path import NoisePath
from shared.diffusion.unet import UNet
from shared.evaluator import Evaluator, Judge, SetScore, cropping_judge, load_evaluator, score_set
from shared.options import SamplingOptions, picture_seed
from shared.pictures import grid, png_bytes
from shared.registry import resolve, resolve_evaluator
from shared.storage import Location
from shared.vocabulary import LabelError, Vocabulary, read_test_file
from trainer.data import Dataset, named
from trainer.errors import TrainerError
from trainer.objectives.denoiser import Denoising, fixed_loss
from trainer.plugins import plugins
from trainer.runs import Run, log_samples

Lists = Sequence[Sequence[str]]  # label lists, one a picture
OnStep = Callable[[Sequence[Row]], None] | None
GRID_PICTURES: Final = 32  # in the grids of a run
SCORES: Final = ("accuracy", "exact_match", "f1")
SAMPLING: Final = SamplingOptions()  # few steps, since a run waits while it is sampled


@dataclass(frozen=True)
class ScoredRun:
    seed: int
    score: SetScore
    images: Tensor  # (N, 3, H, W)


def targets_of(lists: Lists, vocabulary: Vocabulary) -> Tensor:
    """Return label lists as multi-hot rows, (N, K)."""
    return torch.tensor([vocabulary.multi_hot(labels) for labels in lists])


def tests_of(data: Path, files: list[Path] | None, vocabulary: Vocabulary) -> dict[str, list[list[str]]]:
    """Return the label lists of each test file by its name: `files`, or by default those in the data set's folder.

    TrainerError for two files of one name.
    """
    if files is None:
        files = [path for path in (data / "test.json", data / "new_test.json") if path.exists()]
    found = {path.stem: read_test_file(path, vocabulary) for path in files}
    if len(found) < len(files):
        raise TrainerError("several of --tests have one name, under which scores are logged; rename them")
    return found


def open_evaluator(path: Location, device: torch.device) -> Evaluator:
    """Load an evaluator from a checkpoint, or from a file of a form that only its data set has."""
    if module := plugins().evaluators.get(path.suffix):
        evaluator: Evaluator = importlib.import_module(module).read(path, device)
        return evaluator
    return load_evaluator(path, device)


def load_judge(path: Location, vocabulary: Vocabulary, device: torch.device) -> Evaluator:
    """Load an evaluator that judges a denoiser of `vocabulary`. TrainerError if it does not know all of these labels.

    It may know more, in any order, as in the service.
    """
    judge = open_evaluator(path, device)
    if unknown := [label for label in vocabulary.names if label not in judge.vocabulary]:
        problem = f"does not know the denoiser's labels {named(unknown)}; fit one that does"
        raise TrainerError(f"the evaluator {path.stem} {problem}")
    return judge


def evaluator_path(storage: Location, name: str | None, denoiser: CheckpointInfo) -> Location:
    """Return the evaluator of that name, the denoiser's own for None, or the file for one that a plug-in reads."""
    if name is None:
        return resolve_evaluator(storage, denoiser)
    return file if (file := Path(name)).suffix in plugins().evaluators else resolve(storage, name, "evaluator")


def make_options(preset: str, changes: dict[str, Any], denoiser: CheckpointInfo) -> SamplingOptions:
    """Return a sampling preset with changes; `default` is the denoiser's own. TrainerError for more steps than T."""
    start = denoiser.sampling if preset == "default" else plugins().presets[preset].sampling
    options = SamplingOptions.model_validate({**start.model_dump(), **changes})
    if options.steps > denoiser.max_steps:
        raise TrainerError(f"{options.steps} steps: {denoiser.name} has {denoiser.max_steps} timesteps")
    return options


def score_run(
    stepper: Stepper, judge: Judge, lists: Lists, options: SamplingOptions, seed: int, on_step: OnStep = None,
    vocabulary: Vocabulary | None = None,
) -> ScoredRun:  # fmt: skip
    """Sample and judge one picture for each label list.

    `vocabulary`: the denoiser's, which may be a part of the judge's; by default they are the same. The verdict is on
    all labels of the judge, so an object that the denoiser has no name for counts as wrong.
    """
    targets = targets_of(lists, vocabulary or judge.vocabulary)
    seeds = [picture_seed(seed, i) for i in range(len(lists))]
    images = sample(stepper, targets, options, seeds, on_step=on_step)
    wanted = targets_of(lists, judge.vocabulary)
    return ScoredRun(seed, score_set(judge.probabilities(images), wanted, judge.vocabulary.names), images)


def score_runs(
    stepper: Stepper, judge: Judge, lists: Lists, options: SamplingOptions, *,
    repeats: int, seed: int = 0, on_step: OnStep = None, vocabulary: Vocabulary | None = None,
) -> tuple[list[ScoredRun], dict[str, Any]]:  # fmt: skip
    """Return runs with the seeds from `seed`, and their figures with pictures/s and network rows a picture."""
    start, rows_before, pictures = time.monotonic(), stepper.network_rows, repeats * len(lists)
    runs = [score_run(stepper, judge, lists, options, seed + r, on_step, vocabulary) for r in range(repeats)]
    rate = pictures / (time.monotonic() - start)
    rows = (stepper.network_rows - rows_before) / pictures
    return runs, {"pictures_per_s": rate, "rows_per_picture": rows, **summary(runs)}


def score_file(
    file: Path, denoiser: Denoiser, evaluator: Evaluator, options: SamplingOptions, *,
    repeats: int, seed: int, progress: Progress, keep_padding: bool = False,
) -> tuple[list[ScoredRun], dict[str, Any]]:  # fmt: skip
    """Score `repeats` runs of a test file; return them and their figures.

    The padding of a denoiser's padded pictures is cropped before they are judged, unless `keep_padding` is set.
    LabelError for a list of another number of objects than the denoiser has learnt.
    """
    judge = cropping_judge(evaluator, 1.0 if keep_padding else denoiser.aspect)
    lists = read_test_file(file, denoiser.vocabulary)
    for i, labels in enumerate(lists):
        if problem := denoiser.info.support.count_problem(len(labels)):
            raise LabelError(problem, entry=i, source=str(file))
    task = progress.add_task(f"sampling {file.name}", total=repeats * len(lists) * options.steps)
    runs, figures = score_runs(
        denoiser.stepper(), judge, lists, options, repeats=repeats, seed=seed,
        on_step=lambda rows: progress.advance(task, len(rows)), vocabulary=denoiser.vocabulary,
    )  # fmt: skip
    described = {
        "file": file.name,
        "model": denoiser.info.name,
        "digest": denoiser.info.digest,
        "options": options.model_dump(),
        "padding": "none" if denoiser.aspect == 1.0 else "kept" if keep_padding else "cut",
    }
    return runs, described | figures


def summary(runs: Sequence[ScoredRun]) -> dict[str, Any]:
    """Return each run's scores, and the maximum, mean and standard deviation of each score over runs."""
    figures: dict[str, Any] = {"runs": [{"seed": run.seed, **asdict(run.score)} for run in runs]}
    for name in SCORES:
        values = [getattr(run.score, name) for run in runs]
        figures[name] = {"max": max(values), "mean": fmean(values), "std": pstdev(values)}
    return figures


def best(runs: Sequence[ScoredRun]) -> ScoredRun:
    """Return the run with the highest accuracy; among equals the highest exact match, then the first."""
    return max(runs, key=lambda run: (run.score.accuracy, run.score.exact_match))


def save_grid(images: Tensor, path: Path) -> None:
    """Write pictures (N, 3, H, W) as one PNG."""
    files.write(path, png_bytes(grid(images)))


@dataclass
class Watcher:
    """Shows a denoiser while it trains: a grid of the first test file, and the scores of each file.

    Without an evaluator it draws only the grid. `losses` are measured, too, such as those of held-out pictures and of
    training pictures: the network remembers what it has seen where the first is much higher.
    """

    path: NoisePath
    vocabulary: Vocabulary
    aspect: float  # width over height of the pictures before padding
    folder: Path
    tests: dict[str, list[list[str]]]
    evaluator: Evaluator | None
    device: torch.device
    options: SamplingOptions = SAMPLING
    layouts: Layouts | None = None  # of a network that takes positions
    losses: Mapping[str, Denoising] = field(default_factory=dict)  # by name in the log
    shown: Lists = ()  # label lists of the grid where there are no test files

    def stepper(self, network: nn.Module) -> Stepper:
        """Return the sampling loop of `network`, which is put into evaluation mode."""
        unet = cast(UNet, network.eval())  # or a distillation's network, which has the same attributes
        return make_stepper(
            unet, unet.config, self.path, self.layouts, device=self.device, dtype=autocast_dtype(self.device)
        )

    def __call__(self, network: nn.Module, run: Run) -> dict[str, float]:
        stepper = self.stepper(network)
        figures: dict[str, float] = {}
        if not self.tests and self.shown:
            self._log_grid(stepper, self.shown, run)
        for i, (name, lists) in enumerate(self.tests.items()):
            if self.evaluator:
                judge = cropping_judge(self.evaluator, self.aspect)
                scored = score_run(stepper, judge, lists, self.options, seed=0, vocabulary=self.vocabulary)
                images = scored.images
                figures |= {f"{name}/{score}": getattr(scored.score, score) for score in SCORES}
                if i == 0:
                    log_samples(self.folder, grid(images[:GRID_PICTURES]), run.step)
            elif i == 0:
                self._log_grid(stepper, lists, run)
        return figures | {name: fixed_loss(network, one, batch=one.config.batch) for name, one in self.losses.items()}

    def _log_grid(self, stepper: Stepper, lists: Lists, run: Run) -> None:
        targets = targets_of(lists[:GRID_PICTURES], self.vocabulary)
        seeds = [picture_seed(0, i) for i in range(len(targets))]
        log_samples(self.folder, grid(sample(stepper, targets, self.options, seeds)), run.step)


def some_lists(dataset: Dataset) -> list[list[str]]:
    """Return the first different label lists of a data set's pictures, for a grid."""
    known = dataset.labels[dataset.labels.any(1)]
    distinct = {tuple(row.nonzero()[:, 0].tolist()): None for row in known[: 64 * GRID_PICTURES]}
    return [[dataset.vocabulary.names[i] for i in indices] for indices in list(distinct)[:GRID_PICTURES]]
