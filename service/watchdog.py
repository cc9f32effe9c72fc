"""Whether a process lives: a worker whose loop hangs ends itself, and supervisors look at LABELGRID_ALIVE_FILE.

Knows no Redis: a supervisor that restarts workers must not depend on it, or all would restart while Redis is away.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from service.settings import SettingError, Settings
from service.telemetry.logs import get_logger

log = get_logger(__name__)

EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits.h
TICK_S = 1.0
MAX_AGE_S = 30.0  # of the file; a busy machine or a Redis that does not answer takes a few
end_process = os._exit  # nothing else ends a thread that is stuck in C code


def watch(settings: Settings, progress: Callable[[], float], ended: threading.Event) -> None:
    """Log every thread's stack and end the process once `progress()` has been the same for `stalled_after_s`.

    Runs until `ended`, in a thread of its own, and touches the file. It counts the seconds in which it ran, since a
    process that was paused is not stuck.
    """
    last, same_s = progress(), 0.0
    touch(settings)
    while not ended.wait(TICK_S):
        touch(settings)
        before, last = last, progress()
        same_s = same_s + TICK_S if last == before else 0.0
        if same_s >= settings.stalled_after_s:
            log.critical("the loop hangs; this worker ends", seconds=same_s)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            end_process(EXIT_HUNG)


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


def is_alive(file: Path) -> bool:
    """Whether a process has touched the file lately."""
    try:
        return time.time() - file.stat().st_mtime < MAX_AGE_S
    except OSError:
        return False
