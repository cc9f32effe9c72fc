"""Files in storage: pictures, grids, trajectories and uploads of jobs, and threads for calls that may hang.

Of a job, HOUR/JOB/ has 0.png, 1.png, ..., trajectory-0.png and grid.png; Redis holds everything else. The hour is that
of the job's creation, so that old ones are found without reading anything. Knows no Redis and no HTTP.

No thread can be interrupted in a read or write that hangs. So a fixed number of daemon threads makes these calls, each
with a deadline: more never hang, and they do not keep the process.
"""

import asyncio
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from service.contract.records import HOUR, hour_of
from service.telemetry.logs import get_logger
from shared import storage
from shared.storage import Location

log = get_logger(__name__)

GRID: Final = "grid.png"
HOUR_S = 3600
THREADS = 16  # an object store answers in tens of milliseconds, so that many pictures are on their way at once

Result = TypeVar("Result")
Call = tuple["Future[Any]", Callable[[], Any]]


def picture_name(index: int) -> str:
    """Return the name of a picture's file, which is also that of an uploaded picture."""
    return f"{index}.png"


def trajectory_name(index: int) -> str:
    return f"trajectory-{index}.png"


class PictureFiles:
    """The files of all jobs in one storage. Errors are OSErrors."""

    def __init__(self, root: Location) -> None:
        self.root = root

    def folder(self, job_id: str) -> Location:
        return self.root / hour_of(job_id) / job_id

    def write(self, job_id: str, name: str, content: bytes) -> None:
        if isinstance(self.root, Path):  # other users of this machine have no business in it
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        storage.write(self.folder(job_id) / name, content)

    def read(self, job_id: str, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return a file of a job, or its bytes from `start` to `end`. FileNotFoundError if there is none."""
        return storage.read(self.folder(job_id) / name, start, end)

    def size(self, job_id: str, name: str) -> int:
        """Return how many bytes a file of a job has. FileNotFoundError if there is none."""
        return storage.size(self.folder(job_id) / name)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job."""
        storage.remove_folder(self.folder(job_id))

    def remove_older(self, created_before: float) -> int:
        """Remove the files of all jobs of hours that ended before this time (Unix seconds). Returns how many hours.

        Leaves what is not ours, and what cannot be removed, such as a copy that another user has restored.
        """
        oldest = datetime.fromtimestamp(created_before - HOUR_S, UTC).strftime("%Y-%m-%dT%H")
        removed = 0
        for hour in storage.folders(self.root):
            if HOUR.fullmatch(hour) and hour < oldest:
                try:
                    storage.remove_folder(self.root / hour)
                    removed += 1
                except OSError as error:
                    log.warning("old pictures cannot be removed", reason=str(error))
        return removed


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

    async def one(self, work: Callable[[], Result], within_s: float) -> Result:
        """Return what `work` returns, without blocking the event loop. Stalled after `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                return await asyncio.wrap_future(self.submit(work))
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
