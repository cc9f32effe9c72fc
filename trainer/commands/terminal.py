"""Shared by the commands: option types, checks of arguments, progress bars, tables, and reading a data set."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from shared import storage as files
from shared.vocabulary import SHOWN_NAMES
from trainer.errors import TrainerError

if TYPE_CHECKING:  # these import torch
    from trainer.data import Dataset
    from trainer.runs import Run
    from trainer.score import ScoredRun

console = Console(stderr=True)
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # among those that torchrun starts; the others print nothing


def open_storage(address: str) -> files.Location:
    """Return the storage at an address. Raises TrainerError for an address that no installed driver can open."""
    try:
        return files.open_storage(address)
    except ValueError as error:
        raise TrainerError(str(error)) from error


Storage = Annotated[
    Path,  # or the like-named location at an address
    typer.Option(
        envvar="LABELGRID_STORAGE",
        parser=open_storage,
        help="Where checkpoints are published to and read from: a folder, or an address such as s3://bucket/path.",
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Minutes = Annotated[float | None, typer.Option(min=0.01, help="Stop after so many minutes of training.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change one field of the configuration: --set batch=64. Repeatable.")
]
EvaluateMinutes = Annotated[float, typer.Option(min=0.1, help="Minutes between sample grids and scores.")]
LoggedEvaluator = Annotated[
    str | None, typer.Option(help="Name of an evaluator whose scores are logged. It does not affect the training.")
]
Evaluator = Annotated[str | None, typer.Option(help="Evaluator's name; the promoted one by default.")]
Model = Annotated[str | None, typer.Option(help="Denoiser's name; the promoted one by default.")]
KeepPadding = Annotated[bool, typer.Option(help="Judge padded pictures without cropping the padding, as the report.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all randomness.")]
Sampler = Annotated[str | None, typer.Option(help="ddpm, ddpm_small, ddim, euler, dpmpp_1, dpmpp_2m or sde_dpmpp_2m.")]
SamplingSteps = Annotated[int | None, typer.Option("--steps", help="Sampling steps.")]
Spacing = Annotated[str | None, typer.Option(help="uniform, logsnr or trailing.")]
Guidance = Annotated[float | None, typer.Option(help="w of classifier-free guidance; 1 is none.")]
Interval = Annotated[tuple[float, float] | None, typer.Option(help="Noise levels (fractions of T) with guidance on.")]
Grid = Annotated[Path | None, typer.Option(help="Write the best run's pictures here as PNG.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures here.")]
Existing = typer.Option(exists=True, help="A data set folder: objects.json, train.json and the pictures it names.")


def given_sampling(
    sampler: str | None,
    steps: int | None,
    spacing: str | None,
    guidance: float | None,
    interval: tuple[float, float] | None,
) -> dict[str, Any]:
    """Return the sampling options that were given, under the names that SamplingOptions has for them."""
    named = {"sampler": sampler, "steps": steps, "spacing": spacing, "guidance": guidance}
    return {key: value for key, value in {**named, "guidance_interval": interval}.items() if value is not None}


def check_file(path: Path | None, suffix: str) -> None:
    """Refuse a file that cannot be written, before the work instead of after it."""
    if path and path.suffix != suffix:
        raise TrainerError(f"{path} must end in {suffix}")
    if path and not path.parent.is_dir():
        raise TrainerError(f"{path}: there is no folder {path.parent}")


def check_budget(minutes: float | None, steps: int | None, options: str = "--minutes or --steps") -> None:
    """Refuse a budget without an end; `options` names what would set one."""
    if minutes is not None and not math.isfinite(minutes):
        raise TrainerError(f"--minutes {minutes} is not a length of time")
    if not minutes and not steps:
        raise TrainerError(f"say how long: {options}")


class StatusColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("status", ""))


def bar() -> Progress:
    """Return a progress display on stderr if that is a terminal. A task may show more in its field `status`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        StatusColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal and MAIN_PROCESS),
    )


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """Print what a command did, on stderr."""
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    if MAIN_PROCESS:
        console.print(table)


def spent(run: Run) -> list[tuple[str, str]]:
    """Return the rows for `show` with what a run has spent, noting one that was finished before."""
    finished = " (the run was finished before)" if run.resumed_at == run.step else ""
    return [("steps", f"{run.step}{finished}"), ("minutes", f"{run.elapsed_s / 60:.1f}")]


def show_scores(
    file: Path, runs: list[ScoredRun], figures: dict[str, Any], *,
    json_out: Path | None, grid: Path | None, columns: int = 8,
) -> None:  # fmt: skip
    """Print the scores of a test file on stdout, and write the figures and the best run's pictures where asked to."""
    from trainer.score import SCORES, best, save_grid

    table = Table("run", "seed", *SCORES, title=f"{file.name}, {figures['model']}")
    for i, run in enumerate(runs):
        table.add_row(str(i), str(run.seed), *(f"{getattr(run.score, name):.4f}" for name in SCORES))
    table.add_section()
    for kind in ("max", "mean", "std"):
        table.add_row(kind, "", *(f"{figures[name][kind]:.4f}" for name in SCORES))
    stdout = Console()
    stdout.print(table)
    stdout.print(
        f"{figures['pictures_per_s']:.1f} pictures/s, {figures['rows_per_picture']:.1f} network rows a picture"
    )
    if grid:
        save_grid(best(runs).images, grid, columns)
    write_json(json_out, figures)


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def note_unseen(dataset: Dataset) -> None:
    """Print the labels that no picture shows: a request may name them, but the networks cannot learn them."""
    unseen = [name for name, seen in zip(dataset.vocabulary.names, dataset.labels.any(0), strict=True) if not seen]
    if unseen and MAIN_PROCESS:
        more = f" and {len(unseen) - SHOWN_NAMES} more" if len(unseen) > SHOWN_NAMES else ""
        console.print(
            f"note: no picture shows {', '.join(unseen[:SHOWN_NAMES])}{more}, so they cannot be learnt",
            markup=False, soft_wrap=True, highlight=False,
        )  # fmt: skip


def read_dataset(folder: Path, progress: Progress, **how: Any) -> Dataset:
    """Load a data set folder, with its progress shown. `how`: the arguments of `load_dataset`."""
    from trainer.data import load_dataset

    task = progress.add_task(f"reading {folder}", total=None)
    dataset = load_dataset(folder, advance=lambda n: progress.advance(task, n), **how)
    progress.update(task, total=len(dataset), completed=len(dataset))
    return dataset
