"""Jobs from Redis, with their pictures from storage, for their owner. Knows no HTTP.

Storage never blocks the event loop: a call that hangs is a 503 after some seconds.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TypeVar

from service import pictures
from service.api.slots import Slots
from service.contract.errors import ExpiredJob, NotReady, Unavailable, UnknownPicture
from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.pictures import PictureFiles
from service.storage_threads import Stalled, StorageThreads
from service.store.reader import JobReader
from service.store.workers import ReadyWorkers
from service.telemetry.logs import get_logger

log = get_logger(__name__)

PATIENCE_S = 5.0
READ_TOGETHER = 64  # pictures and grids, each of which may have some megabytes
READ_FOR_ONE = 8  # of them for one owner
ZIPPED_TOGETHER = 4  # pictures of a zip, which wait in memory for a slow client

T = TypeVar("T")


class ResultReader:
    """Reads jobs with their pictures, and writes and removes pictures."""

    def __init__(self, jobs: JobReader, files: PictureFiles, workers: ReadyWorkers) -> None:
        self.jobs, self.files, self.workers = jobs, files, workers
        self._threads = StorageThreads()
        self._reading = Slots(READ_TOGETHER, READ_FOR_ONE)

    async def job(self, job_id: str) -> Job:
        """Return the job in its current state. UnknownJob, ExpiredJob; Unavailable if it cannot be read now."""
        job = await self.jobs.job(job_id)
        if job.status not in TERMINAL:
            problems = (about.get("storage_problem") for about in await self.workers())
            job = job.model_copy(update={"delay": next(filter(None, problems), None)})
        return job

    async def image(self, job_id: str, owner: str, index: int) -> bytes:
        """Return a picture's PNG. NotReady until it is finished; UnknownJob, ExpiredJob, UnknownPicture."""
        async with self._reading.of(owner):
            return await self._png(job_id, pictures.picture(index), index)

    async def trajectory(self, job_id: str, owner: str, index: int) -> bytes:
        """Return a picture's trajectory as PNG. The same errors; UnknownPicture also if the job has none."""
        record = await self.jobs.record(job_id)
        if record.trajectory is None:
            raise UnknownPicture("the job has no trajectories; request them with `trajectory`")
        async with self._reading.of(owner):
            return await self._png(job_id, pictures.trajectory(index), index)

    async def grid(self, job_id: str, owner: str) -> bytes:
        """Return the grid's PNG. NotReady until the job is finished; UnknownJob, ExpiredJob."""
        job = await self.jobs.job(job_id)
        if job.result is None:
            raise NotReady.of("the grid", job.status)
        if len(job.result.pictures) == 1 and job.seed is not None:  # sampled: the picture is the grid
            return await self.image(job_id, owner, getattr(job.result, "best", 0))
        async with self._reading.of(owner):
            return await self._png(job_id, pictures.GRID, 0)

    async def images(self, job_id: str, owner: str) -> AsyncIterator[bytes]:
        """Return the PNGs of a finished job's result, a few at a time. NotReady, UnknownJob, ExpiredJob.

        ExpiredJob also between two of them, if the job is deleted meanwhile.
        """
        job = await self.jobs.job(job_id)
        if job.result is None:
            raise NotReady.of("the zip of all pictures", job.status)
        n = len(job.result.pictures)
        first = getattr(job.result, "best", 0) * n
        return self._images(job_id, owner, range(first, first + n))

    async def _images(self, job_id: str, owner: str, indices: range) -> AsyncIterator[bytes]:
        for first in range(0, len(indices), ZIPPED_TOGETHER):
            part = indices[first : first + ZIPPED_TOGETHER]
            for png in await asyncio.gather(*(self.image(job_id, owner, index) for index in part)):
                yield png

    async def uploaded(self, job_id: str, total: int) -> list[bytes]:
        """Return all pictures that were uploaded for a job. ExpiredJob if one is gone."""
        try:
            return await self._all([partial(self.files.read, job_id, pictures.picture(i)) for i in range(total)])
        except FileNotFoundError as error:
            raise ExpiredJob.of(job_id) from error

    async def upload(self, job_id: str, pngs: Sequence[bytes]) -> None:
        """Write pictures that a job is to judge. Unavailable if storage does not take them."""
        await self._all([partial(self.files.write, job_id, pictures.picture(i), png) for i, png in enumerate(pngs)])

    async def remove(self, job_id: str) -> None:
        """Remove a job's pictures. Unavailable if storage does not answer."""
        await self._all([partial(self.files.remove, job_id)])

    async def _png(self, job_id: str, name: str, index: int) -> bytes:
        try:
            (png,) = await self._all([partial(self.files.read, job_id, name)])
        except FileNotFoundError:
            await self.jobs.check_picture(job_id, index)  # which raises the reason
            raise ExpiredJob.of(job_id) from None
        return png

    async def _all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make calls to storage at the same time. FileNotFoundError if a file is missing."""
        try:
            return await asyncio.gather(*(self._threads.one(call, PATIENCE_S) for call in calls))
        except FileNotFoundError:
            raise
        except (OSError, Stalled) as error:
            log.warning("the storage of pictures cannot be reached", reason=str(error))
            raise Unavailable(
                "the storage of pictures does not answer; try again", headers={"Retry-After": "5"}
            ) from error
