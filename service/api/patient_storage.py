"""Calls to storage that may hang, with a deadline. Knows neither models nor HTTP.

A read of a network file system or of an object store can block for ever, and no thread can be interrupted in it. So one
thread alone talks to storage, and requests wait for it only so long.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from service.storage_threads import Stalled, StorageThreads

PATIENCE_S = 2.0  # how long a request waits that can be answered from memory; longer calls count as stalled
DEADLINE_S = 30.0  # how long one waits that cannot: a large checkpoint may have to be read whole
PATIENT = 8  # requests that may wait so long at the same time; they occupy threads that others need

Result = TypeVar("Result")


class PatientStorage:
    """Runs calls one after the other."""

    def __init__(self) -> None:
        self._calls = StorageThreads(1)
        self._begun: float | None = None  # when the call in progress began
        self._patient = threading.Semaphore(PATIENT)

    @property
    def is_stalled(self) -> bool:
        begun = self._begun
        return begun is not None and time.monotonic() - begun > PATIENCE_S

    def call(self, work: Callable[[], Result], can_do_without: bool) -> Result:
        """Return what `work` returns. Raises Stalled if that takes too long; it may still be done later."""
        stalled = self.is_stalled
        if stalled and can_do_without:
            raise Stalled("storage has not answered in time")
        future = self._calls.submit(partial(self._timed, work))
        if not stalled:
            _wait(future, PATIENCE_S)
        if not (future.done() or can_do_without) and self._patient.acquire(blocking=False):
            try:
                _wait(future, DEADLINE_S)
            finally:
                self._patient.release()
        if not future.done():
            future.cancel()  # unless it is in progress
            raise Stalled("storage has not answered in time")
        return future.result()

    async def call_async(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, without blocking the event loop. Raises Stalled after PATIENCE_S."""
        return await self._calls.one(partial(self._timed, work), PATIENCE_S)

    def _timed(self, work: Callable[[], Result]) -> Result:
        self._begun = time.monotonic()
        try:
            return work()
        finally:
            self._begun = None


def _wait(future: Future[Any], within_s: float) -> None:
    """Return once the future is done, or after `within_s`. At a third of the cost of `concurrent.futures.wait`."""
    with contextlib.suppress(TimeoutError):
        future.exception(within_s)
