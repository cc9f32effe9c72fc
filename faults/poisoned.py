"""`python -m faults.poisoned worker`: a worker whose network cannot handle three labels.

A picture of a purple cube fails in every step; one of a purple sphere kills the process, as a driver's fault would; one
of a purple cylinder hangs. With the variable KILL_BEFORE_GRID, a file, the first process to compose a grid creates the
file and is killed.
"""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from service.__main__ import main
from service.contract.records import JobResult, Verdict
from service.worker import storer
from shared.diffusion.denoise import Row, Stepper
from shared.vocabulary import ICLEVR

FAILS, KILLS, HANGS = (ICLEVR.names.index(f"purple {shape}") for shape in ("cube", "sphere", "cylinder"))
MARK = "KILL_BEFORE_GRID"
step, score = Stepper.step, storer.score


def poisoned_step(self: Stepper, rows: Sequence[Row]) -> None:
    if _have(rows, KILLS):
        os.kill(os.getpid(), signal.SIGKILL)
    if _have(rows, HANGS):
        time.sleep(3600)
    if _have(rows, FAILS):
        raise RuntimeError("poison")
    step(self, rows)


def _have(rows: Sequence[Row], label: int) -> bool:
    """Whether a picture has a label."""
    return any(bool(row.labels.reshape(len(row.labels), -1)[label].any()) for row in rows)


def poisoned_score(verdicts: Sequence[Verdict], n: int) -> JobResult:
    if n > 1:
        with contextlib.suppress(FileExistsError):
            Path(os.environ[MARK]).touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    return score(verdicts, n)


if __name__ == "__main__":
    Stepper.step = poisoned_step  # type: ignore[method-assign]
    if MARK in os.environ:
        storer.score = poisoned_score
    main()
