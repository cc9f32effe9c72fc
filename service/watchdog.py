"""Ends a worker whose loop hangs, so that it is restarted and others take over its pictures. Knows no jobs."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable

from service.telemetry.logs import get_logger

log = get_logger(__name__)

EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits.h
TICK_S = 1.0
end_process = os._exit  # nothing else ends a thread that is stuck in C code


def watch(progress: Callable[[], float], limit_s: float, ended: threading.Event) -> None:
    """Log every thread's stack and end the process once `progress()` has been the same for `limit_s`.

    Runs until `ended`, in a thread of its own. It counts the seconds in which it ran, since a process that was paused
    is not stuck.
    """
    last, same_s = progress(), 0.0
    while not ended.wait(TICK_S):
        before, last = last, progress()
        same_s = same_s + TICK_S if last == before else 0.0
        if same_s >= limit_s:
            log.critical("the loop hangs; this worker ends", seconds=same_s)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            end_process(EXIT_HUNG)
