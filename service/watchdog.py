"""A worker whose loop hangs ends itself, to be restarted. Knows no Redis: workers go on while it is away."""

import faulthandler
import math
import sys
import time

TICK_S = 1.0


class Watchdog:
    """Ends the process, after a traceback of every thread, once its loop has not moved for `stalled_after_s`.

    A thread in C does it, which needs no lock of Python that a stuck call may hold.
    """

    def __init__(self, stalled_after_s: float) -> None:
        self.stalled_after_s = stalled_after_s
        self._set_at = -math.inf

    def moved(self) -> None:
        """Note that the loop moves, once a second at most."""
        if time.monotonic() - self._set_at >= TICK_S:
            self._set_at = time.monotonic()
            faulthandler.dump_traceback_later(self.stalled_after_s + TICK_S, exit=True, file=sys.__stderr__ or 2)
