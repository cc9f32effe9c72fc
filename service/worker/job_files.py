"""The files of jobs, as a worker reads and writes them: trouble with one job's files, or with storage as a whole.

Calls of storage may fail or hang. They wait in coroutines, all in one thread, and hold up no other job's.
"""

import asyncio
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.contract.records import new_job_id
from service.files import THREADS, PictureFiles, Stalled, StorageThreads, picture_name
from service.telemetry.boundary import reason_of, start_vital
from service.telemetry.logs import get_logger
from shared.pictures import read_png

log = get_logger(__name__)

RETRY_S = 1.0  # before a call is repeated that failed
ATTEMPTS = 3  # of a job's calls, while storage works
SAMPLE = b"A worker wrote this to see whether storage works."

T = TypeVar("T")


class JobFiles:
    """Calls of storage for jobs.

    If one fails or hangs, the worker writes and reads a file of its own. If that works, the trouble is the job's: the
    call is repeated, and raises its error in the end. If not, storage fails: `problem` says why, and all calls wait
    until it works again.
    """

    def __init__(self, files: PictureFiles, patience_s: float) -> None:
        """`patience_s`: how long a call may take before it counts as hanging."""
        self.files, self.patience_s = files, patience_s
        self.problem = ""
        self.failing_since = 0.0  # monotonic seconds; means something while there is a problem
        self._loop, self._own = asyncio.new_event_loop(), StorageThreads(1)
        start_vital("job files", partial(_run, self._loop))
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop).atexit = False

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine beside others, in the one thread of all."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def all(
        self, calls: Mapping[str, Callable[[], T]], is_wanted: Callable[[], bool], sample: bytes = SAMPLE
    ) -> list[T]:
        """Return what the calls of one job return, each given with a note for its error.

        Raises the error of one. CancelledError if a call is in trouble, and its result is not wanted any more.
        `sample`: what to write to see whether storage works, as large as what a call writes, for a disk may be full.
        """
        failures, answers = 0, list[asyncio.Future[T]]()
        while calls:
            if not answers:  # each time with threads of its own, which others' hanging calls cannot take
                threads = StorageThreads(min(len(calls), THREADS))
                answers = [asyncio.wrap_future(threads.submit(call)) for call in calls.values()]
            _, late = await asyncio.wait(answers, timeout=self.patience_s)
            stalled = Stalled(f"storage has not answered within {self.patience_s:g} s")
            errors = [answer.exception() if answer.done() else stalled for answer in answers]
            error, note = next((one for one in zip(errors, calls, strict=True) if one[0]), (None, ""))
            if error is None:
                return [answer.result() for answer in answers]
            failures += 1
            if isinstance(error, OSError | Stalled) and await self._fails(sample):
                failures = 0
            if not is_wanted():
                raise asyncio.CancelledError
            if not isinstance(error, OSError | Stalled) or failures == ATTEMPTS:
                if note:
                    error.add_note(note)
                raise error
            await asyncio.sleep(RETRY_S)
            while self.problem and is_wanted():
                await asyncio.sleep(RETRY_S)
            if not late:
                answers = []
        return []

    async def _fails(self, sample: bytes) -> bool:
        """Whether storage fails. If so, the problem is noted, and looked at again until it is gone."""
        if not self.problem and (problem := await self._look(sample)) and not self.problem:
            self.problem, self.failing_since = problem, time.monotonic()
            log.warning("pictures cannot be stored; retrying", storage=str(self.files.root), reason=problem)
            self._watching = asyncio.ensure_future(self._watch(sample))
        return bool(self.problem)

    async def _watch(self, sample: bytes) -> None:
        while self.problem:
            await asyncio.sleep(RETRY_S)
            self.problem = await self._look(sample)

    async def _look(self, sample: bytes) -> str:
        """Write, read and remove a file; return why that fails. Of a worker that dies meanwhile, it expires as others.

        It is a driver's error, too, if nobody foresaw it.
        """
        try:
            await self._own.one(partial(_try_out, self.files, sample), self.patience_s)
        except Exception as error:
            return str(error) if isinstance(error, Stalled) else reason_of(error)
        return ""


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def read_pixels(files: PictureFiles, job_id: str, index: int) -> NDArray[np.uint8]:
    """Read a picture (H, W, 3). An OSError is of storage: for one that is gone or damaged there are other errors."""
    try:
        png = files.read(job_id, picture_name(index))
    except FileNotFoundError as error:
        raise LookupError("it is no longer in storage") from error
    try:
        return read_png(png)
    except OSError as error:  # Pillow's
        raise ValueError(f"it is damaged: {error}") from error


def _try_out(files: PictureFiles, sample: bytes) -> None:
    job_id = new_job_id(time.time())
    files.write(job_id, "sample", sample)
    if files.read(job_id, "sample") != sample:
        raise OSError("storage returns something else than was written")
    files.remove(job_id)
