"""Pictures that break the worker which samples them. Its command is `python -m faults.poisoned worker`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from faults.harness import Stack, until
from faults.trial import LABELS, Trial

WORKER = "faults.poisoned worker"
IMPATIENT = {"LABELGRID_STALLED_AFTER_S": "4"}


def poison_picture(trial: Trial) -> None:
    """a picture that fails in every step: only its job fails"""
    trial.begin()
    trial.strike(lambda: trial.submit_failing([*LABELS, ["purple cube"]], "picture 4: RuntimeError: poison"))
    trial.recover()


def poison_picture_that_kills(trial: Trial) -> None:
    """a picture that kills every worker: only its job fails, after four deaths"""
    _kills(trial, "purple sphere")


def _kills(trial: Trial, label: str) -> None:
    trial.begin()
    poisoned: list[str] = []
    trial.strike(lambda: poisoned.append(trial.submit_failing([[label]], "workers died or failed 4 times")))
    trial.wait(poisoned)
    if len(trial.stack.deaths) != 4:
        raise RuntimeError(f"{len(trial.stack.deaths)} workers died instead of 4")
    trial.struck_at = trial.stack.deaths[-1][1]
    trial.recover()


def hung_picture(trial: Trial) -> None:
    """a picture that hangs every worker, with `stalled_after_s` = 4: only its job fails, after four workers have ended
    themselves"""
    _kills(trial, "purple cylinder")


def hung_picture_one_worker(trial: Trial) -> None:
    """the same with one worker"""
    _kills(trial, "purple cylinder")


def killed_before_the_grid(trial: Trial) -> None:
    """a worker is killed between the last picture of a job and its grid: another one composes it"""
    trial.begin()
    mark = Path(trial.stack.environment["KILL_BEFORE_GRID"])
    mark.unlink()  # the run without a fault had it
    trial.strike(lambda: until(mark.exists, "a worker that composes a grid"))
    until(lambda: trial.stack.deaths, "its death")
    trial.recover()


@contextlib.contextmanager
def marked(stack: Stack) -> Iterator[None]:
    """Let no worker die of its first grid until the fault."""
    mark = stack.folder / "composed"
    mark.touch()
    stack.environment["KILL_BEFORE_GRID"] = str(mark)
    yield
