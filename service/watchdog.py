"""Whether a process lives: a worker whose loop hangs ends itself, and supervisors look at LABELGRID_ALIVE_FILE.

Knows no Redis: a supervisor that restarts workers must not depend on it, or all would restart while Redis is away.
"""

import contextlib
import faulthandler
import math
import sys
import time
from pathlib import Path

from service.settings import SettingError, Settings

TICK_S = 1.0
MAX_AGE_S = 30.0  # of the file, beyond the longest step; a busy machine or a Redis that does not answer takes a few


class Watchdog:
    """Ends the process, after a traceback of every thread, once its loop has not moved for `stalled_after_s`.

    A thread in C does it, which needs no lock of Python that a stuck call may hold.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._set_at = -math.inf

    def moved(self) -> None:
        """Note that the loop moves, once a second at most."""
        if time.monotonic() - self._set_at >= TICK_S:
            self._set_at = time.monotonic()
            touch(self.settings)
            faulthandler.dump_traceback_later(
                self.settings.stalled_after_s + TICK_S, exit=True, file=sys.__stderr__ or 2
            )


def reset(settings: Settings) -> None:
    """Remove the file that an earlier process left. SettingError if it cannot be written."""
    if (file := settings.alive_file) is None:
        return
    try:
        file.touch()
        file.unlink()
    except OSError as error:
        raise SettingError("alive_file", file, f"cannot be written: {error.strerror}") from error


def touch(settings: Settings) -> None:
    """Show that the process lives. It goes on if that fails, as on a full disk."""
    if settings.alive_file is not None:
        with contextlib.suppress(OSError):
            settings.alive_file.touch()


def is_alive(file: Path, stalled_after_s: float) -> bool:
    """Whether a process has touched the file lately."""
    try:
        return time.time() - file.stat().st_mtime < stalled_after_s + MAX_AGE_S
    except OSError:
        return False
