"""A boundary stands wherever many units of work meet: pictures in a batch, jobs, models, tasks of a loop.

An exception that nobody foresaw ends the smallest unit that it concerns. Its traceback is logged, it is counted, and
the rest goes on. Where a thread fails that the process needs, or its loop hangs, the process ends and is restarted.
Knows no torch and no Redis.
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from service.telemetry.logs import get_logger
from service.telemetry.metrics import UNFORESEEN

log = get_logger(__name__)

CRASHED = 1  # exit status
end_process = os._exit  # nothing may catch it

LOG_EVERY_S = 10.0  # the same unit: some are tried in every iteration of a loop
_logged = dict[Any, float]()
TICK_S = 1.0  # between two settings of the timer that ends the process

T = TypeVar("T")
R = TypeVar("R")
Passes = Callable[[Exception], bool]


def reason_of(error: Exception) -> str:
    """Return what clients may read of an error: its notes, its type and the first line, without any path."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    parts = [*getattr(error, "__notes__", ()), type(error).__name__, text.partition("\n")[0][:200]]
    return ": ".join(filter(None, parts))


@contextlib.contextmanager
def confined(
    unit: str,
    give_up: Callable[[str], object] = lambda reason: None,
    passes: Passes = lambda error: False,
    **about: Any,
) -> Iterator[None]:
    """End one unit of work, such as a "job", if it raises: call `give_up` with the reason.

    passes: which errors are raised again, as they concern every unit. about: which unit it is, for the log.
    """
    try:
        yield
    except Exception as error:
        if passes(error):
            raise
        UNFORESEEN.labels(unit).inc()
        if time.monotonic() - _logged.get((unit, *about.values()), -LOG_EVERY_S) >= LOG_EVERY_S:
            if len(_logged) > 1000:
                _logged.clear()
            _logged[unit, *about.values()] = time.monotonic()
            log.error(f"{unit} failed", exc_info=error, **about)
        give_up(reason_of(error))


def attempt(
    work: Callable[[Sequence[T]], Sequence[R] | None],
    items: Sequence[T],
    give_up: Callable[[T, str], R],
    about: Callable[[T], Mapping[str, Any]],
    passes: Passes,
) -> list[R]:
    """Do `work` for pictures and return what it returns; if it raises, do it for each half of them.

    Of one that fails alone, return what `give_up` makes of the reason. `work` must leave every picture as it was if it
    raises. The other parameters are those of `confined`.
    """
    if not items:
        return []
    if len(items) == 1:
        given_up = list[R]()
        end = lambda reason: given_up.append(give_up(items[0], reason))  # noqa: E731
        with confined("picture", end, passes, **about(items[0])):
            return list(work(items) or [])
        return given_up
    try:
        return list(work(items) or [])
    except Exception as error:
        if passes(error):
            raise
        jobs = sorted({about(item)["job_id"] for item in items})
        log.warning("work failed; it is repeated for each half of its pictures", jobs=jobs, exc_info=error)
        half = len(items) // 2
        return [one for part in (items[:half], items[half:]) for one in attempt(work, part, give_up, about, passes)]


def start_vital(name: str, run: Callable[[], None]) -> threading.Thread:
    """Run a thread that the process needs, such as its heartbeat's. If it raises, the process ends and is restarted."""

    def run_or_end() -> None:
        try:
            run()
        except BaseException:
            try:
                log.critical("a thread has failed that the process needs; it ends", task=name, exc_info=True)
            finally:
                end_process(CRASHED)

    thread = threading.Thread(target=run_or_end, name=name, daemon=True)
    thread.start()
    return thread


class Watchdog:
    """Sees whether a loop moves. While `ends_process` is true, one that has not for `stalled_after_s` ends the process.

    Then a thread in C logs a traceback of every thread, which needs no lock of Python that a stuck call may hold. While
    Redis is away, a loop moves.
    """

    def __init__(self, stalled_after_s: float) -> None:
        self.stalled_after_s, self.ends_process = stalled_after_s, False
        self.moved_at, self._set_at = time.monotonic(), -math.inf

    @property
    def stalled(self) -> bool:
        """Whether the loop seems to hang: the worker counts as not ready some time before its process ends."""
        return time.monotonic() - self.moved_at > self.stalled_after_s / 2

    def moved(self) -> None:
        """Note the end of an iteration, or of an attempt to reach Redis."""
        self.moved_at = time.monotonic()
        if self.ends_process and self.moved_at - self._set_at >= TICK_S:
            self._set_at = self.moved_at
            faulthandler.dump_traceback_later(self.stalled_after_s + TICK_S, exit=True, file=sys.__stderr__ or 2)
