"""Jobs and pictures for their owner: from Redis while it has them, then from storage, if results are kept there.

Knows no HTTP. Storage never blocks the event loop: a call that hangs is a 503 after some seconds.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from service.api.slots import Slots
from service.contract import answers
from service.contract.errors import ExpiredJob, NotReady, ServiceError, Unavailable, UnknownJob, UnknownPicture
from service.contract.kept import KeptJob
from service.contract.schemas import Job, JobHead, JobPage
from service.results import files
from service.results.files import ResultFiles
from service.storage_threads import Stalled, StorageThreads
from service.store.reader import NO_TRAJECTORIES, JobReader, no_picture
from service.telemetry.logs import get_logger
from shared.storage import Location

log = get_logger(__name__)

PATIENCE_S = 5.0
READ_TOGETHER = 64  # pictures and grids, each of which may have some megabytes
READ_FOR_ONE = 8  # of them for one owner
ZIPPED_TOGETHER = 4  # pictures of a zip, which wait in memory for a slow client
FETCHED_TOGETHER = 16  # jobs of a list
SCANNED = 200  # jobs in storage that a search looks at for one page
IN_STORAGE = "0" * 13 + "-"  # begins the cursor of a page that begins in storage: no job in Redis is so old
NEWEST = "f" * 32  # a cursor's id before the first job in storage

T = TypeVar("T")
Gone = (UnknownJob, ExpiredJob)


class ResultReader:
    """Reads jobs with their results. `root`: the storage; None if results are in Redis only."""

    def __init__(self, jobs: JobReader, root: "Location | None") -> None:
        self.jobs = jobs
        self.files = None if root is None else ResultFiles(root)
        self.threads = StorageThreads()
        self._reading = Slots(READ_TOGETHER, READ_FOR_ONE)

    async def check_owner(self, job_id: str, owner: str) -> None:
        """UnknownJob if the job belongs to another owner, as if it did not exist."""
        try:
            await self.jobs.check_owner(job_id, owner)
        except UnknownJob:
            if await self._kept(job_id, owner) is None:
                raise

    async def job(self, job_id: str, owner: str) -> Job:
        """Return the job in its current state. UnknownJob, ExpiredJob; Unavailable if it cannot be read now."""
        return await self._whole(self.jobs.job(job_id), job_id, owner)

    async def wait(
        self, job_id: str, owner: str, timeout_s: float, gone: asyncio.Future[None], is_new: bool = False
    ) -> Job:
        """Return the job once it has ended, as `JobReader.wait` does. The same errors as `job`."""
        return await self._whole(self.jobs.wait(job_id, timeout_s, gone, is_new), job_id, owner)

    async def is_kept(self, job_id: str, owner: str) -> bool:
        """Whether storage has the job. Unavailable if that cannot be read now."""
        return await self._kept(job_id, owner) is not None

    async def _whole(self, in_redis: Awaitable[Job], job_id: str, owner: str) -> Job:
        try:
            return await in_redis
        except Gone:
            kept = await self._kept(job_id, owner)
            if kept is None:
                raise
            shown = kept.result.best_indices(kept.record)
            best = [kept.verdicts[index] for index in shown]
            return answers.whole(kept.record, _state(kept), kept.record.total, kept.result, best)

    async def image(self, job_id: str, owner: str, index: int) -> bytes:
        """Return a picture's PNG. NotReady until it is finished; UnknownJob, ExpiredJob, UnknownPicture."""
        async with self._reading.of(owner):
            return await self._png(self.jobs.image(job_id, index), job_id, owner, files.picture, index)

    async def trajectory(self, job_id: str, owner: str, index: int) -> bytes:
        """Return a picture's trajectory as PNG. The same errors; UnknownPicture also if the job has none."""
        async with self._reading.of(owner):
            return await self._png(self.jobs.trajectory(job_id, index), job_id, owner, files.trajectory, index)

    async def grid(self, job_id: str, owner: str) -> bytes:
        """Return the grid's PNG. NotReady until the job is finished; UnknownJob, ExpiredJob."""
        async with self._reading.of(owner):
            found = await self._grid(job_id, owner)
        return found if isinstance(found, bytes) else await self.image(job_id, owner, found)

    async def _grid(self, job_id: str, owner: str) -> bytes | int:
        """Return the grid's PNG, or the index of the job's only picture."""
        found: bytes | int | None
        try:
            found = await self.jobs.grid(job_id)
        except (NotReady, *Gone) as error:
            kept = await self._kept(job_id, owner)
            if kept is None:
                raise _without_files(error, job_id) from None
            found = kept.grid if kept.grid is not None else await self._read(job_id, owner, files.GRID)
        if found is None:
            raise ExpiredJob.of(job_id)
        return found

    async def images(self, job_id: str, owner: str) -> AsyncIterator[bytes]:
        """Return the PNGs of a finished job's result, a few at a time. NotReady, UnknownJob, ExpiredJob.

        ExpiredJob also between two of them, if the job is deleted meanwhile.
        """
        job = await self.job(job_id, owner)
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

    async def delete(self, job_id: str, owner: str) -> None:
        """Remove a job's files. Unavailable if storage does not answer."""
        if self.files is not None:
            await self._call(partial(self.files.remove_job, owner, job_id))

    async def page(self, owner: str, limit: int, cursor: str | None, label: str = "") -> JobPage:
        """Return up to `limit` of an owner's jobs: those in Redis, then those that only storage has, newest first.

        `cursor`: the previous page's `next`. `label`: only jobs with this text in one of their labels.
        """
        page = await self.jobs.page(owner, limit, cursor, label)
        if self.files is None or page.next is not None:
            return page
        before = cursor.removeprefix(IN_STORAGE) if cursor and cursor.startswith(IN_STORAGE) else NEWEST
        try:
            heads, last, is_last = await self._kept_heads(owner, before, limit - len(page.jobs), label)
        except Unavailable:
            if not page.jobs:
                raise
            heads, last, is_last = [], before, False  # the next page says that storage does not answer
        return JobPage(jobs=page.jobs + heads, next=None if is_last else IN_STORAGE + last)

    async def _kept_heads(self, owner: str, before: str, room: int, label: str) -> tuple[list[JobHead], str, bool]:
        """Return up to `room` jobs before `before`, the id of the last one looked at, and whether no more follow."""
        assert self.files is not None
        heads, last = list[JobHead](), before
        ids = await self._call(partial(self._ids, owner, before))
        for first in range(0, len(ids), FETCHED_TOGETHER):
            part = ids[first : first + FETCHED_TOGETHER]
            gone = await self.jobs.without(part)  # Redis has listed the others
            kept = dict(zip(gone, await asyncio.gather(*(self._kept(one, owner) for one in gone)), strict=True))
            for job_id in part:
                if len(heads) == room:
                    return heads, last, False
                job = kept.get(job_id)
                if job is not None and answers.has_label(job.record, label):
                    heads.append(answers.head(job.record, _state(job), job.record.total))
                last = job_id
        return heads, last, len(ids) < SCANNED

    def _ids(self, owner: str, before: str) -> Sequence[str]:
        """Return the first SCANNED ids in storage after `before`, newest first."""
        assert self.files is not None
        found = list[str]()
        for job_id in self.files.job_ids(owner, "" if before == NEWEST else before):
            found.append(job_id)
            if len(found) == SCANNED:
                break
        return found

    async def _png(
        self, in_redis: Awaitable[bytes], job_id: str, owner: str, name_of: Callable[[int], str], index: int
    ) -> bytes:
        try:
            return await in_redis
        except (NotReady, *Gone) as error:
            png = await self._read(job_id, owner, name_of(index))
            if png is not None:
                return png
            kept = None if isinstance(error, NotReady) else await self._kept(job_id, owner)
            if kept is None:
                raise _without_files(error, job_id) from None
            if kept.record.trajectory is None and name_of is files.trajectory:
                raise UnknownPicture(NO_TRAJECTORIES) from error
            raise UnknownPicture(no_picture(index, kept.record.total)) from error

    async def _kept(self, job_id: str, owner: str) -> KeptJob | None:
        return None if self.files is None else await self._call(partial(self.files.read_job, owner, job_id))

    async def _read(self, job_id: str, owner: str, name: str) -> bytes | None:
        return None if self.files is None else await self._call(partial(self.files.read, owner, job_id, name))

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await self.threads.one(work, PATIENCE_S)
        except (OSError, Stalled) as error:
            log.warning("results in storage cannot be reached", reason=str(error))
            raise Unavailable(
                "the results' storage does not answer; try again", headers={"Retry-After": "5"}
            ) from error


def _without_files(error: ServiceError, job_id: str) -> ServiceError:
    """Return the error for what neither Redis nor storage has, given that of Redis: of a finished job it is lost."""
    is_lost = isinstance(error, NotReady) and error.members.get("job_status") == "finished"
    return ExpiredJob.of(job_id) if is_lost else error


def _state(kept: KeptJob) -> dict[str, str]:
    """Return the state of a finished job as Redis has it."""
    started = {} if kept.started_at is None else {"started_at": str(kept.started_at)}
    return {"status": "finished", "finished_at": str(kept.finished_at), **started}
