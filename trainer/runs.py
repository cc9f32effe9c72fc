"""A training run on disk: its budget, its setup, the state that it resumes from, and its log. Knows no network."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress, TaskID
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from shared import storage as files
from trainer.errors import TrainerError

SAVE_EVERY_S = 300.0
LOG_EVERY = 50  # steps


@dataclass
class Budget:
    """How long a run lasts: minutes of training time, steps, or whichever ends first. At least one is set."""

    minutes: float | None = None
    steps: int | None = None

    def progress(self, elapsed_s: float, step: int) -> float:
        """The share of the budget that is spent; 1 or more when the run is finished."""
        by_time = elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        return max(by_time, step / self.steps if self.steps else 0.0)


@dataclass
class Run:
    """Where a run stands, for its observers: the progress bar, the sample grids, the tests."""

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = 0.0  # mean of the last LOG_EVERY steps
    progress: float = 0.0
    resumed_at: int = 0  # the step that this process resumed at; equal to `step` where nothing was left to do
    history: list[dict[str, float]] = field(default_factory=list)


def rate_share(step: int, progress: float, warmup_steps: int, cooldown: float) -> float:
    """Return the factor of the learning rate: a linear warm-up, then 1, then linear to 0 over the last `cooldown`."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    down = min(1.0, max(0.0, 1 - progress) / cooldown) if cooldown else 1.0
    return warm * down


def step_seed(seed: int, step: int) -> int:
    """Return the seed of all randomness in a step. It follows from (seed, step), so resuming needs no random state."""
    return (seed * 1_000_003 + step) % 2**64  # torch takes no more bits


def show_progress(progress: Progress, what: str, batch: int | None = None) -> Callable[[Run], None]:
    """An `on_step` that moves a bar from 0 to 1000 per mille; with `batch` it shows pictures per second.

    The bar appears at the first step, so a run that has nothing to do has none.
    """
    task: TaskID | None = None

    def on_step(run: Run) -> None:
        nonlocal task
        if task is None:
            task = progress.add_task(what, total=1000)
        status = f"{what}: step {run.step}" + (f", loss {run.loss:.4f}" if run.loss else "")  # none is known at first
        if batch:
            status += f", {run.step * batch / max(run.elapsed_s, 1e-9):.0f} pictures/s"
        progress.update(task, completed=int(1000 * run.progress), description=status)

    return on_step


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state that a run resumes from, atomically: its `recipe` and whatever changes in the run."""
    try:
        with files.replacing(path) as file:
            torch.save(state, file)
    except RuntimeError as error:  # what torch raises for a full disk
        raise TrainerError(f"{path} cannot be written; is the disk full? ({error})") from error


def load_state(path: Path, recipe: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """Return the state in `path`, on the CPU.

    On a GPU it would stay in memory beside the network, and AdamW would wait for the GPU to read each parameter's step.

    A run resumes only with the recipe and the shape of `network` that it was started with, since its log describes one
    of each. Raises TrainerError for another one, and for a damaged file.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before = state["recipe"]
        shapes = {key: value.shape for key, value in state["network"].items()}
        assert {"step", "elapsed_s", "averages", "optimizers"} <= state.keys()
    except Exception as error:  # torch raises a dozen types for a broken file
        raise TrainerError(
            f"{path} is not the state of a run of this version; choose another --run, or delete it to start again"
        ) from error
    # a setting that the state lacks is newer than the run, and "auto" means what the run has
    if changed := [key for key in recipe if recipe[key] not in (before.get(key, recipe[key]), "auto")]:
        problem = f"was started with another {changed[0]}"  # from which others may follow, as settings do from the data
        raise TrainerError(f"{path} {problem}; choose another --run or delete it")
    if shapes != {key: value.shape for key, value in network.state_dict().items()}:
        raise TrainerError(f"{path} holds a network of another shape; choose another --run or delete it")
    return state


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turn what reading another or a damaged file raises into a TrainerError that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise TrainerError(f"{path} is damaged, or was not written by this version ({problem})") from error


def keep_setup(folder: Path, setup: dict[str, Any]) -> None:
    """Write `folder`/setup.json. Raises TrainerError where the work in `folder` had another setup."""
    path, now = folder / "setup.json", json.loads(json.dumps(setup))
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with undamaged(path):
            before = json.loads(path.read_text())
            other = [key for key in now if now[key] != before.get(key)]
        if other:
            raise TrainerError(f"{path} has another {', '.join(other)}; choose another folder")
    files.write(path, f"{json.dumps(now, indent=1)}\n".encode())


@contextmanager
def run_log(folder: Path | None, step: int = 0) -> Iterator[Callable[[Run, dict[str, float]], None]]:
    """Yield a function that appends figures to `folder`/log.jsonl and `folder`/tensorboard, or nowhere for None.

    What a run logged after `step`, at which it resumes, is dropped, since these steps come again.
    """
    if folder is None:
        yield lambda run, figures: None
        return
    path = folder / "log.jsonl"
    with _open_log(path) as lines, SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1) as events:
        lines.truncate(_bytes_up_to(step, path))

        def record(run: Run, figures: dict[str, float]) -> None:
            lines.write(json.dumps({"step": run.step, "minutes": round(run.elapsed_s / 60, 2), **figures}) + "\n")
            for key, value in figures.items():
                events.add_scalar(key, value, run.step)

        yield record


def _open_log(path: Path) -> TextIO:
    """Open a log to append to.

    Raises TrainerError if another process has it open: two runs in one folder would overwrite each other's state.
    """
    lines = path.open("a", buffering=1)
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lines.close()
        raise TrainerError(
            f"{path.parent} is in use by another process; wait for its end or choose another --run"
        ) from error
    except OSError:  # a file system without locks
        pass
    return lines


def _bytes_up_to(step: int, path: Path) -> int:
    """Return how long a log is up to `step`, without a last line that a full disk left unfinished."""
    kept = 0
    with undamaged(path):
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
    return kept


def log_samples(folder: Path, pixels: NDArray[np.uint8], step: int) -> None:
    """Write a grid (H, W, 3) of sampled pictures as `folder`/samples-STEP.png, and to TensorBoard."""
    Image.fromarray(pixels).save(folder / f"samples-{step:07d}.png")
    with SummaryWriter(str(folder / "tensorboard")) as events:
        events.add_image("samples", pixels, step, dataformats="HWC")


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the lines of a run's log.jsonl."""
    with undamaged(path):
        lines: list[dict[str, float]] = [json.loads(line) for line in path.read_text().splitlines()]
        if not all("step" in line for line in lines):
            raise ValueError("a line without a step")
    return lines
