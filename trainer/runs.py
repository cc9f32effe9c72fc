"""A training run on disk: its budget, its setup, the state that it resumes from, and its log. Knows no network."""

from __future__ import annotations

import fcntl
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

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
FREE: Final = frozenset({"evaluate_every"})  # fields of a recipe that do not change what is learnt


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
    rate: float = 1.0  # factor of the learning rate, which is halved each time that the run has diverged
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Every:
    """How often something happens: after so many minutes or so many steps; never if neither is set."""

    minutes: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """Read `10m`, minutes, or `500`, steps; 0 is never. Raises TrainerError for anything else."""
        try:
            if text.endswith("m"):
                every = cls(minutes=float(text.removesuffix("m")) or None)
            else:
                every = cls(steps=int(text) or None)
            if not 0 < (every.minutes or every.steps or 1) < float("inf"):
                raise ValueError(text)
        except ValueError as error:
            raise TrainerError(f'"{text}" is neither minutes, as 10m, nor steps, as 500') from error
        return every

    def is_due(self, seconds: float, steps: int) -> bool:
        """Whether it is time again, `seconds` and `steps` after the last time."""
        by_time = self.minutes is not None and steps > 0 and seconds >= 60 * self.minutes
        return by_time or (self.steps is not None and steps >= self.steps)


NEVER: Final = Every()


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal that asked this process to stop inside this context, or 0.

    SIGTERM, of a cluster that takes its machine back, too; SIGUSR1, which Slurm sends so many seconds before it kills;
    and Ctrl-C, which interrupts at once when it comes again. The context changes nothing outside the main thread.
    """
    received = list[int]()

    def handle(number: int, _: object) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1] if in_main_thread else []
    former = {number: signal.signal(number, handle) for number in signals}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


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

    The bar appears at the first step, so a run that has nothing to do has none. The rate is that of this process.
    """
    task: TaskID | None = None
    first = 0, 0.0  # step and seconds

    def on_step(run: Run) -> None:
        nonlocal task, first
        if task is None:
            task, first = progress.add_task(what, total=1000), (run.step, run.elapsed_s)
        status = f"{what}: step {run.step}" + (f", loss {run.loss:.4f}" if run.loss else "")  # none is known at first
        status += f", diverged, so the rate is {run.rate:g} of lr" if run.rate < 1 else ""
        if batch and run.step > first[0]:
            status += f", {(run.step - first[0]) * batch / max(run.elapsed_s - first[1], 1e-9):.0f} pictures/s"
        progress.update(task, completed=int(1000 * run.progress), description=status)

    return on_step


# Objective -> steps that are enough to judge a first model by, and what so many gave: the cards in models/ say how
USUAL: Final = {
    "denoiser": (2400, "emoji-64 drew 0.85 of unseen label sets exactly after 2,390 of batch 64"),
    "evaluator": (1500, "emoji-resnet10 judged 0.81 of unseen pictures exactly after 1,465"),
}
MEASURED: Final = 100  # first steps of a process, after which it says how long a run takes


def say_when(objective: str, say: Callable[[str], None]) -> Callable[[Run], None]:
    """An `on_step` that calls `say` once, with how long a usual run of this objective takes here."""
    start: tuple[int, float] | None = None

    def on_step(run: Run) -> None:
        nonlocal start
        start = start or (run.step, run.elapsed_s)
        if run.step - start[0] == MEASURED and objective in USUAL:
            steps, result = USUAL[objective]
            minutes = (run.elapsed_s - start[1]) / MEASURED * steps / 60
            say(f"{steps:,} steps take {minutes:.0f} minutes here ({result})")

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

    A run resumes only with the recipe, but for FREE, and the shape of `network` that it was started with, since its log
    describes one of each. Raises TrainerError for another one, and for a damaged file.
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
    changed = [key for key in recipe if recipe[key] not in (before.get(key, recipe[key]), "auto") and key not in FREE]
    if changed:
        problem = f"was started with another {changed[0]}"  # from which others may follow, as settings do from the data
        raise TrainerError(f"{path} {problem}; choose another --run or delete it")
    if shapes != {key: value.shape for key, value in network.state_dict().items()}:
        raise TrainerError(f"{path} holds a network of another shape; choose another --run or delete it")
    return state


@contextmanager
def undamaged(path: files.Location) -> Iterator[None]:
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


class Log:
    """A run's log: `folder`/log.jsonl, and the same figures and sample grids in `folder`/tensorboard.

    It writes nothing for None, as in all processes but the first.
    """

    def __init__(self, folder: Path | None, lines: TextIO | None = None, events: SummaryWriter | None = None) -> None:
        self.folder, self.lines, self.events = folder, lines, events

    def record(self, run: Run, figures: dict[str, float]) -> None:
        if self.lines is None or self.events is None:
            return
        self.lines.write(json.dumps({"step": run.step, "minutes": round(run.elapsed_s / 60, 2), **figures}) + "\n")
        for key, value in figures.items():
            self.events.add_scalar(key, value, run.step)

    def show_samples(self, run: Run) -> None:
        """Show the sample grid of this step, if there is one (`log_samples`), in TensorBoard too."""
        if self.folder and self.events and (grid := _samples(self.folder, run.step)).exists():
            with Image.open(grid) as pixels:
                self.events.add_image("samples", np.array(pixels), run.step, dataformats="HWC")

    def go_back(self, step: int) -> None:
        """Drop what was logged after `step`, since these steps come again."""
        if self.folder and self.lines:
            self.lines.truncate(_bytes_up_to(step, self.folder / "log.jsonl"))


@contextmanager
def run_log(folder: Path | None, step: int = 0) -> Iterator[Log]:
    """Yield the log of the run in `folder`, which resumes at `step`."""
    if folder is None:
        yield Log(None)
        return
    # the only writer: TensorBoard reads one file of a run, and forgets what is in an earlier one
    with (
        _open_log(folder / "log.jsonl") as lines,
        SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1) as events,
    ):
        log = Log(folder, lines, events)
        log.go_back(step)
        yield log


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
    """Write a grid (H, W, 3) of sampled pictures as `folder`/samples-STEP.png, where the run's log finds it."""
    Image.fromarray(pixels).save(_samples(folder, step))


def _samples(folder: Path, step: int) -> Path:
    return folder / f"samples-{step:07d}.png"


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the lines of a run's log.jsonl."""
    with undamaged(path):
        lines: list[dict[str, float]] = [json.loads(line) for line in path.read_text().splitlines()]
        if not all("step" in line for line in lines):
            raise ValueError("a line without a step")
    return lines
