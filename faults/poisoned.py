"""`python -m faults.poisoned worker`: a worker whose network cannot handle three labels.

A picture of a purple cube fails in every step; one of a purple sphere kills the process, as a driver's fault would; one
of a purple cylinder hangs. With the variable KILL_BEFORE_GRID, a file, the first process to compose a grid creates the
file and is killed. With BREAKS_STORAGE, a file, the job whose id it contains cannot be stored, for a reason that nobody
foresaw, or the process whose id it contains cannot write.
"""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from iclevr.labels import ICLEVR
from service.__main__ import main
from service.contract.records import JobResult, Verdict
from service.files import PictureFiles
from service.worker import storer
from shared.diffusion.denoise import Row, Stepper

FAILS, KILLS, HANGS = (ICLEVR.names.index(f"purple {shape}") for shape in ("cube", "sphere", "cylinder"))
MARK = "KILL_BEFORE_GRID"
BREAKS = "BREAKS_STORAGE"
step, score, write = Stepper.step, storer.score, PictureFiles.write


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


def poisoned_write(self: PictureFiles, job_id: str, name: str, content: bytes) -> None:
    broken = Path(os.environ[BREAKS]).read_text()
    if broken == job_id:
        raise ValueError("poison")
    if broken == str(os.getpid()):
        raise OSError(errno.EROFS, "Read-only file system")
    write(self, job_id, name, content)


if __name__ == "__main__":
    Stepper.step = poisoned_step  # type: ignore[method-assign]
    if MARK in os.environ:
        storer.score = poisoned_score
    if BREAKS in os.environ:
        PictureFiles.write = poisoned_write  # type: ignore[method-assign]
    main()
