"""What the commands print and check: progress bars, tables, notes, and arguments that would fail late."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from shared import storage as files
from shared.checkpoint import CheckpointKind, check_replaces, path_of
from shared.storage import Location
from shared.vocabulary import SHOWN_NAMES
from trainer.errors import TrainerError

if TYPE_CHECKING:  # these import torch, and make `--help` slow
    import torch

    from trainer.data import Dataset
    from trainer.runs import Run
    from trainer.score import ScoredRun

LINE_EVERY_S = 60.0  # between lines about progress, where there is no terminal
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # characters that a terminal would obey, but for line ends
console = Console(stderr=True)
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # among those that torchrun starts; the others print nothing


def plain(text: str) -> str:
    """Make a text safe to print: that of a foreign data set may hold anything."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def pick_device(name: str) -> torch.device:
    """Return the device of that name, and flush denormals from now on. TrainerError for one that is not there."""
    from shared import device

    device.flush_denormals()
    try:
        return device.pick_device(name)
    except device.DeviceError as error:
        raise TrainerError(str(error)) from error


def machine(device: str) -> str:
    """Return what a network was trained on, in words, for its card."""
    from shared.device import device_name

    return device_name(pick_device(device))


def check_file(path: Path | None, suffix: str = "") -> None:
    """Refuse a file that cannot be written, or has another suffix, before the work instead of after it."""
    if path is None:
        return
    if suffix and path.suffix != suffix:
        raise TrainerError(f"{path} must end in {suffix}")
    if path.is_dir():
        raise TrainerError(f"{path} is a folder, not a file to write")
    check_folder(path.parent)


def check_folder(path: Path, option: str = "") -> None:
    """Refuse a folder that cannot be written or created. `option`: that named it, of a command with several."""
    what = f"{option} {path}".lstrip()
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise TrainerError(f"{what}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TrainerError(f"{what} cannot be written: permission denied")


def check_publishes(storage: Location, name: str, kind: CheckpointKind, base: str | None = None) -> None:
    """Refuse a name or storage that the result could not be published under, before the training.

    `base`: the checkpoint that it is made from, which it must not replace.
    """
    path = path_of(storage, name)
    if isinstance(storage, Path):
        check_folder(storage, "--storage")
    check_replaces(path, kind, base)


def check_budget(minutes: float | None, steps: int | None, options: str = "--minutes or --steps") -> None:
    """Refuse a budget without an end; `options` names what would set one."""
    if minutes is not None and not math.isfinite(minutes):
        raise TrainerError(f"--minutes {minutes} is not a length of time")
    if not minutes and not steps:
        raise TrainerError(f"say how long: {options}")


def bar() -> Progress:
    """Return a progress display on stderr: bars in a terminal, and in a log a line a minute."""
    if not console.is_terminal:
        return Lines()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    what = TextColumn("{task.description}", markup=False)
    return Progress(*columns, what, console=console, disable=not MAIN_PROCESS)


class Lines(Progress):
    """Progress as plain lines: one a minute while a task moves, and one at the end of a task that had any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(disable=True, get_time=clock, speed_estimate_period=600)
        self._last: dict[TaskID, float] = {}  # when each task's last line was printed or, before its first, it began
        self._with_lines: set[TaskID] = set()  # tasks that have a line and have not ended

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._print(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print(self._tasks[task_id])

    def _print(self, task: Task) -> None:
        now = self.get_time()
        is_due = now - self._last.setdefault(task.id, now) >= LINE_EVERY_S
        has_ended = task.finished and task.id in self._with_lines
        if not MAIN_PROCESS or not (is_due or has_ended):
            return
        self._last[task.id] = now
        (self._with_lines.discard if task.finished else self._with_lines.add)(task.id)
        remaining = f", {task.time_remaining / 60:.0f} min left" if task.time_remaining else ""
        done = f"{task.percentage:.0f} %" if task.total else f"{task.completed:.0f}"
        print(f"{task.description}: {done}{remaining}", file=sys.stderr, flush=True)


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """Print what a command did, on stderr."""
    table = Table(*_columns("", ""), title=_cell(title), show_header=False)
    for row in rows:
        table.add_row(*map(_cell, row))
    if MAIN_PROCESS:
        console.print(table)


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print the figures of a command on stdout."""
    table = Table(*_columns(*head), title=_cell(title))
    for row in rows:
        table.add_row(*map(_cell, row))
    Console().print(table)


def print_figures(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of figures, whose names are alike, on stdout."""
    cells = [
        ["-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    print_table(title, [name.replace("_", " ") for name in rows[0]], cells)


def _columns(*head: str) -> list[Column]:
    """Return a table's columns. They break a long word, such as a path, which rich would cut off."""
    return [Column(_cell(name), overflow="fold") for name in head]


def _cell(text: str) -> str:
    return escape(plain(text))


def spent(run: Run) -> list[tuple[str, str]]:
    """Return the rows for `show` with what a run has spent, noting one that was finished before."""
    finished = " (the run was finished before)" if run.resumed_at == run.step else ""
    return [("steps", f"{run.step}{finished}"), ("minutes", f"{run.elapsed_s / 60:.1f}")]


def show_scores(file: Path, runs: list[ScoredRun], figures: dict[str, Any]) -> None:
    """Print the scores of a test file on stdout."""
    from trainer.score import SCORES

    rows = [[str(i), str(run.seed), *(f"{getattr(run.score, n):.4f}" for n in SCORES)] for i, run in enumerate(runs)]
    rows += [[kind, "", *(f"{figures[n][kind]:.4f}" for n in SCORES)] for kind in ("max", "mean", "std")]
    print_table(f"{file.name}, {figures['model']}", ["run", "seed", *SCORES], rows)
    print(f"{figures['pictures_per_s']:.1f} pictures/s, {figures['rows_per_picture']:.1f} network rows a picture")


def write_json(path: Path | None, figures: object) -> None:
    if path:
        files.write(path, (json.dumps(figures, indent=1) + "\n").encode())


def note_unseen(dataset: Dataset) -> None:
    """Print the labels that no picture shows: a request may name them, but the networks cannot learn them."""
    from trainer.data import named

    unseen = [name for name, seen in zip(dataset.vocabulary.names, dataset.labels.any(0), strict=True) if not seen]
    if unseen and MAIN_PROCESS:
        note(f"no picture shows {named(unseen, SHOWN_NAMES)}, so they cannot be learnt")


def note(text: str) -> None:
    """Print a remark on stderr."""
    console.print(plain(f"note: {text}"), markup=False, soft_wrap=True, highlight=False)


def with_card(write: Callable[[], object]) -> None:
    """Write a checkpoint's card. Storage that cannot be written, such as an installation's, only lacks it then."""
    try:
        write()
    except OSError as error:
        note(f"the model's card was not written ({error})")
