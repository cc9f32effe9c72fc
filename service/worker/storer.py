"""Stores finished pictures and completes jobs: files first, then verdicts in Redis, then scores and grid.

Knows no networks and no queues.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.contract import recipe
from service.contract.recipe import MadeWith
from service.contract.records import FinishedPicture, JobRecord, JobResult, Scores, Verdict, breakdown
from service.files import GRID, picture_name, trajectory_name
from service.store.claims import BegunClaim, PictureStream
from service.store.connection import concerns_all
from service.store.jobs import JobStore
from service.telemetry import tracing
from service.telemetry.boundary import confined
from service.worker.job_files import SAMPLE, JobFiles, read_pixels
from shared.pictures import marked_grid, png_bytes, sheet

WORST = 20  # pictures of a score that its result shows besides

Pixels = NDArray[np.uint8]  # (H, W, 3), or (n, H, W, 3)


@dataclass(eq=False, kw_only=True)
class Work:
    """Finished pictures of one job, or a job that lacks only its grid and its end, with their claims."""

    job: str
    stream: PictureStream
    judged_by: MadeWith | None
    finished: list[tuple[BegunClaim, FinishedPicture]] = field(default_factory=list)
    complete: list[BegunClaim] = field(default_factory=list)
    judged_at: tuple[float, float] = (0.0, 0.0)  # begin and end, in seconds since 1970
    is_stored: bool = False  # its pictures
    is_wanted: bool = True  # otherwise it ends where storage fails or hangs

    @property
    def entries(self) -> list[str]:
        return [claim.entry for claim in [*(claim for claim, _ in self.finished), *self.complete]]


class Storer:
    """Does each work on its own, so that neither a step of a batch nor another job waits for its files."""

    def __init__(self, store: JobStore, files: JobFiles) -> None:
        self.store, self.files = store, files
        self.works = dict[Work, None]()  # all work that is not over, in order

    def count(self, stream: PictureStream) -> int:
        """Return how many pictures of a model are not stored yet."""
        return sum(len(work.finished) for work in list(self.works) if work.stream is stream and not work.is_stored)

    def submit(self, work: Work) -> None:
        try:
            self.works[work] = None
            self.files.start(self._do(work)).add_done_callback(lambda _: self._end(work))
        except BaseException:
            self._end(work)
            raise

    def _end(self, work: Work) -> None:
        """Hold work no longer. Of what was not stored, the leases expire."""
        if work in self.works:  # else it was left to other workers
            work.stream.leased.difference_update(work.entries)
            self.works.pop(work, None)

    def drop(self, works: Iterable[Work]) -> None:
        """Give up work as soon as its files are in trouble."""
        for work in works:
            work.is_wanted = False

    async def _do(self, work: Work) -> None:
        fail = partial(self.store.fail, work.job)
        with confined("job", fail, concerns_all, job_id=work.job):
            try:
                if work.finished:
                    await self._store(work)
            except asyncio.CancelledError:
                if not self.store.exists(work.job):  # some of its files may have been written since it was deleted
                    await self._remove({work.job}, work)
                raise
        for claim in work.complete:
            fail_grid = lambda reason: fail(f"the result cannot be composed: {reason}")  # noqa: E731
            with confined("job", fail_grid, concerns_all, job_id=work.job):
                await self._complete(work, claim)

    async def _all(self, work: Work, calls: Mapping[str, Callable[[], object]], sample: bytes) -> None:
        await self.files.all(calls, lambda: work.is_wanted, sample)

    async def _store(self, work: Work) -> None:
        """Write files of pictures, then their verdicts."""
        begun_at, writes, largest = time.time(), dict[str, Callable[[], None]](), b""
        for _, one in work.finished:
            index, write = one.picture.index, partial(self.files.files.write, work.job)
            if one.png:  # uploaded pictures are in storage already
                writes[f"picture {index}"] = partial(write, picture_name(index), one.png)
            if one.trajectory is not None:
                writes[f"trajectory {index}"] = partial(write, trajectory_name(index), one.trajectory)
            largest = max(largest, one.png, one.trajectory or b"", key=len)
        await self._all(work, writes, largest)
        # A job ends with its only picture, if that is also its grid.
        results = {
            claim.job: score([one.verdict], 1)
            for claim, one in work.finished
            if claim.record.total == 1 and not claim.record.has_grid
        }
        complete, gone = self.store.commit(work.stream, work.finished, results)
        work.complete += complete
        await self._remove(gone, work)
        work.is_stored = True
        if tracing.provider is not None:
            self._trace(work, begun_at)

    async def _remove(self, gone: set[str], work: Work) -> None:
        """Remove the files of jobs that were deleted while theirs were written."""
        if gone:
            await self._all(work, {job_id: partial(self.files.files.remove, job_id) for job_id in gone}, SAMPLE)

    def _trace(self, work: Work, begun_at: float) -> None:
        """Record in the job's trace what its pictures took. `begun_at`: when the first one was written."""
        claims = [claim for claim, _ in work.finished]
        about: dict[str, str | int] = {"job_id": work.job, "pictures": len(claims)}
        sampled = min(claim.claimed_at for claim in claims), work.judged_at[0]
        times = {"sample": sampled, "judge": work.judged_at, "store": (begun_at, time.time())}
        for name, (begin, end) in times.items():
            tracing.span(name, claims[0].record.traceparent, about, begin).end(int(end * tracing.NS))

    async def _complete(self, work: Work, claim: BegunClaim) -> None:
        """Finish a job that has all its pictures. Any worker may do it, and more than once."""
        record, result = claim.record, None
        verdicts = claim.verdicts or self.store.verdicts(work.job, record.total)
        if verdicts is not None:  # else it is not open, or lacks pictures
            with tracing.span("compose", record.traceparent, {"job_id": work.job}):
                result = score(verdicts, len(record.labels))
                if record.has_grid:
                    shown = await self._pixels(work, result.best_indices(record))
                    grid = compose(record, result, verdicts, work.judged_by, shown)
                    await self._all(work, {"": partial(self.files.files.write, work.job, GRID, grid)}, grid)
        gone = self.store.finish(work.stream, [(claim, result)])
        await self._remove(gone, work)

    async def _pixels(self, work: Work, indices: Sequence[int]) -> Pixels:
        """Return the job's pictures (n, H, W, 3). Those that were stored before this work are read from storage."""
        found = {one.picture.index: one.pixels for _, one in work.finished}
        missing = [index for index in indices if found.get(index) is None]
        reads = {f"picture {index}": partial(read_pixels, self.files.files, work.job, index) for index in missing}
        found |= zip(missing, await self.files.all(reads, lambda: work.is_wanted), strict=True)
        return np.stack([found.pop(index) for index in indices])  # each is in memory once


def score(verdicts: Sequence[Verdict], n: int) -> JobResult:
    """Score each repeat of n pictures as `trainer score` does. The best has the highest accuracy, then exact match."""
    repeats = []
    for first in range(0, len(verdicts), n):
        part = verdicts[first : first + n]
        asked = [len(set(verdict.labels)) for verdict in part]
        hits = sum(round(verdict.accuracy * k) for verdict, k in zip(part, asked, strict=True))
        exact = sum(verdict.exact for verdict in part)
        f1 = sum(verdict.f1 for verdict in part)
        repeats.append(Scores(accuracy=hits / sum(asked), exact_match=exact / n, f1=f1 / n))
    best = max(range(len(repeats)), key=lambda r: (repeats[r].accuracy, repeats[r].exact_match, -r))
    wrong = [one for one in verdicts if not one.exact]
    worst = [one.index for one in sorted(wrong, key=lambda one: (one.f1, one.accuracy, one.index))[:WORST]]
    return JobResult(repeats=repeats, best=best, worst=worst, **breakdown(verdicts))


def compose(
    record: JobRecord,
    result: JobResult,
    verdicts: Sequence[Verdict],
    judged_by: MadeWith | None,
    pixels: Pixels,
) -> bytes:
    """Return the PNG of the best repeat's pictures (n, H, W, 3). Uploaded ones are marked as right or wrong."""
    shown = [verdicts[index] for index in result.best_indices(record)]
    columns = min(record.columns, len(shown))
    if record.uploaded:
        return png_bytes(marked_grid(pixels, [verdict.exact for verdict in shown], columns))
    made_with = recipe.of_grid(record, result.best, shown, judged_by)
    return png_bytes(sheet(pixels, columns), made_with.text())
