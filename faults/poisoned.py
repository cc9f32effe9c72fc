"""`python -m faults.poisoned worker`: a worker whose network cannot handle two labels.

A picture of a purple cube fails in every step; one of a purple sphere kills the process, as a driver's fault would.
"""

import os
import signal
from collections.abc import Sequence

from service.__main__ import main
from shared.diffusion.denoise import Row, Stepper
from shared.vocabulary import ICLEVR

FAILS, KILLS = ICLEVR.names.index("purple cube"), ICLEVR.names.index("purple sphere")
step = Stepper.step


def poisoned_step(self: Stepper, rows: Sequence[Row]) -> None:
    if any(bool(row.labels[KILLS].any()) for row in rows):
        os.kill(os.getpid(), signal.SIGKILL)
    if any(bool(row.labels[FAILS].any()) for row in rows):
        raise RuntimeError("poison")
    step(self, rows)


if __name__ == "__main__":
    Stepper.step = poisoned_step  # type: ignore[method-assign]
    main()
