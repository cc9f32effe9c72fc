"""What the commands have in common: option types, progress bars, tables, reading a data set while a person watches."""

from __future__ import annotations

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

if TYPE_CHECKING:  # of torch, which --help does without
    from trainer.data import Dataset
    from trainer.train import Run

console = Console(stderr=True)


def open_storage(address: str) -> files.Location:
    """The storage at an address. TrainerError for one that nothing here can open."""
    try:
        return files.open_storage(address)
    except ValueError as error:
        raise TrainerError(str(error)) from error


MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of those that torchrun starts, the one that speaks

Storage = Annotated[
    Path,  # or what `open_storage` makes of an address, which is used like one
    typer.Option(
        envvar="LABELGRID_STORAGE",
        parser=open_storage,
        help="Folder that checkpoints are published to and read from, or an address such as s3://bucket/path.",
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Minutes = Annotated[float | None, typer.Option(min=0.01, help="Stop after so many minutes of training.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")]
KeepPadding = Annotated[bool, typer.Option(help="Judge padded pictures borders and all, as the report did.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all randomness.")]
Sampler = Annotated[str | None, typer.Option(help="ddpm, ddpm_small, ddim, euler, dpmpp_1, dpmpp_2m or sde_dpmpp_2m.")]
SamplingSteps = Annotated[int | None, typer.Option("--steps", help="Sampling steps.")]
Spacing = Annotated[str | None, typer.Option(help="uniform, logsnr or trailing.")]
Guidance = Annotated[float | None, typer.Option(help="w of classifier-free guidance; 1 is none.")]
Interval = Annotated[tuple[float, float] | None, typer.Option(help="Noise levels (fractions of T) with guidance on.")]
Existing = typer.Option(exists=True, help="A data set folder: objects.json, train.json and the pictures it names.")


def given_sampling(
    sampler: str | None,
    steps: int | None,
    spacing: str | None,
    guidance: float | None,
    interval: tuple[float, float] | None,
) -> dict[str, Any]:
    """Those options of sampling that were given, by SamplingOptions' names."""
    named = {"sampler": sampler, "steps": steps, "spacing": spacing, "guidance": guidance}
    return {key: value for key, value in {**named, "guidance_interval": interval}.items() if value is not None}


class StatusColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("status", ""))


def bar() -> Progress:
    """Progress on stderr, where that is a terminal; a task may say more in its field `status`."""
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
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    if MAIN_PROCESS:
        console.print(table)


def done(run: Run) -> list[tuple[str, str]]:
    """What a run has spent, for `show`; one that was finished before says so."""
    finished = " (the run was finished before)" if run.resumed_at == run.step else ""
    return [("steps", f"{run.step}{finished}"), ("minutes", f"{run.elapsed_s / 60:.1f}")]


def check_file(path: Path | None, suffix: str) -> None:
    """Refuses a file that could not be written, before the work rather than after it."""
    if path and path.suffix != suffix:
        raise TrainerError(f"{path} must end in {suffix}")
    if path and not path.parent.is_dir():
        raise TrainerError(f"{path}: there is no folder {path.parent}")


def note_unseen(dataset: Dataset) -> None:
    """Names the labels that no picture shows: they can be asked for, but not drawn or judged."""
    unseen = [name for name, seen in zip(dataset.vocabulary.names, dataset.labels.any(0), strict=True) if not seen]
    if unseen and MAIN_PROCESS:
        more = f" and {len(unseen) - SHOWN_NAMES} more" if len(unseen) > SHOWN_NAMES else ""
        console.print(
            f"note: no picture shows {', '.join(unseen[:SHOWN_NAMES])}{more}, of which nothing can be learnt",
            markup=False, soft_wrap=True, highlight=False,
        )  # fmt: skip


def read_dataset(folder: Path, progress: Progress, **how: Any) -> Any:
    from trainer.data import load_dataset

    task = progress.add_task(f"reading {folder}", total=None)
    dataset = load_dataset(folder, advance=lambda n: progress.advance(task, n), **how)
    progress.update(task, total=len(dataset), completed=len(dataset))
    return dataset
