"""The pictures of jobs, from storage, and answers that are sent while they are read.

Storage never blocks the event loop: a call that hangs is a 503 after some seconds.
"""

import asyncio
import contextlib
import io
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from fastapi.responses import Response, StreamingResponse
from redis.exceptions import RedisError
from starlette.types import Receive, Scope, Send

from service.contract.errors import ExpiredJob, NotReady, ServiceError, Unavailable
from service.files import GRID, PictureFiles, Stalled, StorageThreads, picture_name
from service.store.async_jobs import AsyncJobs
from service.telemetry.logs import get_logger

log = get_logger(__name__)

PATIENCE_S = 5.0
READ_TOGETHER = 64  # files, or parts of them
READ_FOR_ONE = 8  # of them for one owner
PART = 1 << 17  # bytes of a file that are read and sent together
ZIPPED_TOGETHER = 4  # pictures of a zip, which wait in memory for a slow client
WRITTEN_TOGETHER = 8  # pictures of an upload
PERMISSIONS = 0o644  # of a zip's files; without them `unzip` makes files that nobody may read

T = TypeVar("T")
Reads = Sequence[Callable[[], bytes]]  # how to read each of some pictures


class Slots:
    """A semaphore of which one owner has a part: nobody waits behind all that another has sent."""

    def __init__(self, count: int, of_one: int = 1) -> None:
        self._all, self._of_one = asyncio.Semaphore(count), of_one
        self._own = WeakValueDictionary[str, asyncio.Semaphore]()  # of owners who use a slot or wait for one

    @asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        own = self._own.setdefault(owner, asyncio.Semaphore(self._of_one))
        async with own, self._all:
            yield


class CutStream(StreamingResponse):
    """Closes the connection before the end if what follows is deleted, or cannot be read, after it has begun."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (ServiceError, RedisError) as error:
            log.warning("answer is cut off", reason=str(error))
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()  # at once, with what it holds


class ResultReader:
    """Reads, writes and removes the pictures of jobs."""

    def __init__(self, jobs: AsyncJobs, files: PictureFiles) -> None:
        self.jobs, self.files = jobs, files
        self._threads = StorageThreads()
        self._reading = Slots(READ_TOGETHER, READ_FOR_ONE)

    async def image(self, job_id: str, owner: str, index: int) -> bytes:
        """Return a picture's PNG. NotReady until it is finished; UnknownJob, ExpiredJob, UnknownPicture."""
        return await self._stored(self.files.read, job_id, owner, picture_name(index), index)

    async def send_grid(self, job_id: str, owner: str, headers: Mapping[str, str] | None = None) -> Response:
        """Answer with the grid's PNG. NotReady until the job is finished; other errors as of `image`."""
        picture = await self.jobs.grid(job_id)
        name = GRID if picture is None else picture_name(picture)
        return await self.send(job_id, owner, name, picture or 0, headers)

    async def send(
        self, job_id: str, owner: str, name: str, index: int, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Answer with the file `name`, of picture `index` or a grid. Errors as of `image`.

        A large one is read while it is sent: where a client does not read, one part waits in memory.
        """
        first = await self._stored(self.files.read, job_id, owner, name, index, 0, PART)
        if len(first) < PART:
            return Response(first, headers=headers, media_type="image/png")
        size = await self._stored(self.files.size, job_id, owner, name, index)

        async def parts() -> AsyncIterator[bytes]:
            yield first
            for start in range(PART, size, PART):
                end = min(start + PART, size)
                part = await self._stored(self.files.read, job_id, owner, name, index, start, end)
                if len(part) != end - start:
                    raise Unavailable(f"{name} of job {job_id!r} was written anew while it was sent; try again")
                yield part

        return CutStream(parts(), media_type="image/png", headers={**(headers or {}), "Content-Length": str(size)})

    async def _stored(
        self, call: Callable[..., T], job_id: str, owner: str, name: str, index: int, *arguments: int
    ) -> T:
        """Make a call about a picture's file, or that of a grid, to storage."""
        async with self._reading.of(owner):
            try:
                return await self._in_storage(call, job_id, name, *arguments)
            except FileNotFoundError:
                await self.jobs.check_picture(job_id, index)  # which raises the reason
                raise ExpiredJob.of(job_id) from None

    async def zipped(self, job_id: str, owner: str) -> AsyncIterator[bytes]:
        """Return the parts of a zip of a finished job's pictures: 0.png, 1.png, ..., as /score takes them.

        A few of them are in memory at any time, the first ones already on return. NotReady, UnknownJob, ExpiredJob; the
        last one also between two parts, if the job is deleted meanwhile.
        """
        job = await self.jobs.job(job_id)
        if job.result is None:
            raise NotReady.of("the zip of all pictures", job.status)
        n = len(job.result.pictures)
        first = getattr(job.result, "best", 0) * n
        parts = zip_stream(partial(self.image, job_id, owner), range(first, first + n))
        return _from(await anext(parts), parts)

    def uploaded(self, job_id: str, total: int) -> Reads:
        """Return how to read each picture that was uploaded for a job. ExpiredJob then if it is gone."""

        def read(name: str) -> bytes:
            try:
                return self.files.read(job_id, name)
            except FileNotFoundError as error:
                raise ExpiredJob.of(job_id) from error

        return [partial(read, picture_name(i)) for i in range(total)]

    async def upload(self, job_id: str, reads: Reads) -> None:
        """Write pictures that a job is to judge, each in the thread that reads it, so that few are in memory.

        Raises Unavailable if storage does not take them, and what reading one raises. Then none is left.
        """

        def write(i: int) -> None:
            self.files.write(job_id, picture_name(i), reads[i]())

        for first in range(0, len(reads), WRITTEN_TOGETHER):
            calls = (self._in_storage(write, i) for i in range(first, min(first + WRITTEN_TOGETHER, len(reads))))
            for error in filter(None, await asyncio.gather(*calls, return_exceptions=True)):
                with contextlib.suppress(Unavailable):  # pruning removes them
                    await self.remove(job_id)
                raise error

    async def remove(self, job_id: str) -> None:
        """Remove a job's pictures. Unavailable if storage does not answer."""
        await self._in_storage(self.files.remove, job_id)

    async def _in_storage(self, call: Callable[..., T], *arguments: Any) -> T:
        """Make a call to storage. FileNotFoundError if a file is missing."""
        try:
            return await self._threads.one(partial(call, *arguments), PATIENCE_S)
        except FileNotFoundError:
            raise
        except (OSError, Stalled) as error:
            log.warning("the storage of pictures cannot be reached", reason=str(error))
            raise Unavailable(
                "the storage of pictures does not answer; try again", headers={"Retry-After": "5"}
            ) from error


async def _from(first: bytes, others: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """Yield a part that was read before the answer began, to know that it can, and then the others."""
    async with aclosing(others):
        yield first
        async for part in others:
            yield part


class _Written(io.RawIOBase):
    """What `zipfile` has written and nobody has taken yet. It cannot seek, so sizes stand behind the pictures."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, part: Any) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


async def zip_stream(read: Callable[[int], Any], indices: range) -> AsyncGenerator[bytes]:
    """Yield the parts of a zip of the PNGs that `read` awaits, named from 0.png. Equal pictures, equal bytes."""
    written = _Written()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:  # a PNG is compressed already
        for first in range(0, len(indices), ZIPPED_TOGETHER):
            pngs = await asyncio.gather(*map(read, indices[first : first + ZIPPED_TOGETHER]))
            for i, png in enumerate(pngs, first):
                entry = zipfile.ZipInfo(f"{i}.png")
                entry.external_attr = PERMISSIONS << 16
                archive.writestr(entry, png)
                yield written.take()
    yield written.take()
