"""The `score` command's parts: options, running with progress, the table and the grid."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shared.device import pick_device
from shared.diffusion.model import load_denoiser
from shared.evaluator import judge_of, load_evaluator
from shared.options import SAMPLING_PRESETS, SamplingOptions
from shared.pictures import grid
from shared.registry import resolve
from shared.vocabulary import read_test_file
from trainer.errors import TrainerError
from trainer.score import ScoredRun, best, check_vocabularies, score_run, summary

SCORES = ("accuracy", "exact_match", "f1")


def make_options(preset: str, changes: dict[str, Any], own: SamplingOptions) -> SamplingOptions:
    """A sampling preset with changes; `default` is the checkpoint's `own`. pydantic's ValidationError for a bad one."""
    presets = {**SAMPLING_PRESETS, "default": own}
    if preset not in presets:
        raise TrainerError(f'no sampling preset "{preset}"; there are {", ".join(presets)}')
    return SamplingOptions.model_validate({**presets[preset].model_dump(), **changes})


def run_score(
    file: Path,
    repeats: int,
    preset: str,
    changes: dict[str, Any],
    storage: Path,
    model: str | None,
    evaluator: str | None,
    seed: int,
    device: str,
    progress: Progress,
    *,
    keep_padding: bool = False,
) -> tuple[list[ScoredRun], dict[str, Any]]:
    """All runs and their figures, with pictures/s and network rows a picture.

    Of a network of padded pictures the evaluator is shown what lies between the borders, or with `keep_padding` all.
    """
    where = pick_device(device)
    denoiser = load_denoiser(resolve(storage, model, "denoiser"), device=where)
    options = make_options(preset, changes, denoiser.options)
    course = evaluator is not None and evaluator.endswith(".pth")
    path = Path(evaluator) if course and evaluator else resolve(storage, evaluator, "evaluator")
    judge = judge_of(load_evaluator(path, where), 1.0 if keep_padding else denoiser.aspect)
    check_vocabularies(denoiser.vocabulary, judge.vocabulary)
    lists = read_test_file(file, denoiser.vocabulary)
    stepper = denoiser.stepper()
    task = progress.add_task(f"sampling {file.name}", total=repeats * len(lists) * options.steps)
    start, runs = time.monotonic(), []
    for r in range(repeats):
        on_step = lambda rows: progress.advance(task, len(rows))  # noqa: E731
        runs.append(score_run(stepper, judge, lists, options, seed + r, on_step=on_step))
    elapsed, pictures = time.monotonic() - start, repeats * len(lists)
    figures: dict[str, Any] = {
        "file": file.name,
        "model": denoiser.info.name,
        "digest": denoiser.info.digest,
        "options": options.model_dump(),
        "padding": "none" if denoiser.aspect == 1.0 else "kept" if keep_padding else "cut",
    }
    figures |= {"pictures_per_s": pictures / elapsed, "rows_per_picture": stepper.network_rows / pictures}
    return runs, figures | summary(runs)


def print_runs(file: Path, runs: list[ScoredRun], figures: dict[str, Any], console: Console) -> None:
    table = Table("run", "seed", *SCORES, title=f"{file.name}, {figures['model']}")
    for i, run in enumerate(runs):
        table.add_row(str(i), str(run.seed), *(f"{getattr(run.score, name):.4f}" for name in SCORES))
    table.add_section()
    for kind in ("max", "mean", "std"):
        table.add_row(kind, "", *(f"{figures[name][kind]:.4f}" for name in SCORES))
    console.print(table)
    console.print(
        f"{figures['pictures_per_s']:.1f} pictures/s, {figures['rows_per_picture']:.1f} network rows a picture"
    )


def write_grid(runs: list[ScoredRun], path: Path, columns: int) -> None:
    """The best run's pictures."""
    Image.fromarray(grid(best(runs).images, columns)).save(path)
