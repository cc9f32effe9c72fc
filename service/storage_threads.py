"""Threads for calls to storage that may hang, each with a deadline. Knows neither files nor HTTP.

No thread can be interrupted in a read or write that hangs, so a fixed number of daemon threads makes these calls: more
never hang, and they do not keep the process.
"""

import asyncio
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

THREADS = 16  # an object store answers in tens of milliseconds, so that many pictures are on their way at once

Result = TypeVar("Result")
Call = tuple["Future[Any]", Callable[[], Any]]


class Stalled(RuntimeError):
    """Storage has not answered in time."""


class StorageThreads:
    """Runs calls in order of arrival, `count` at a time. Its threads end with it."""

    def __init__(self, count: int = THREADS) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        for _ in range(count):
            threading.Thread(target=_run, args=(self._calls,), name="storage", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, work: Callable[[], Result]) -> "Future[Result]":
        future: Future[Result] = Future()
        self._calls.put((future, work))
        return future

    def all(self, works: Sequence[Callable[[], Result]], within_s: float) -> list[Result]:
        """Return what all of `works` return. Stalled after `within_s`."""
        futures = [self.submit(work) for work in works]
        _, late = wait(futures, within_s)
        for future in late:
            future.cancel()  # unless a thread has begun it
        if late:
            raise Stalled(f"storage has not answered within {within_s:g} s")
        return [future.result() for future in futures]

    async def one(self, work: Callable[[], Result], within_s: float) -> Result:
        """Return what `work` returns, without blocking the event loop. Stalled after `within_s`."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.submit(work)), within_s)
        except TimeoutError as error:
            raise Stalled(f"storage has not answered within {within_s:g} s") from error


def _run(calls: "SimpleQueue[Call | None]") -> None:
    """Make calls until a None comes, and pass it on to the next thread. Between two calls nothing of them is kept."""
    while (call := calls.get()) is not None:
        future, work = call
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
        del call, future, work
    calls.put(None)
