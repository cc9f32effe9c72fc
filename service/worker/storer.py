"""Stores finished pictures and completes jobs: files first, then verdicts in Redis, then scores and grid.

Knows no networks and no queues.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from redis.exceptions import RedisError

from service.contract import recipe
from service.contract.recipe import MadeWith
from service.contract.records import FinishedPicture, JobRecord, JobResult, Scores, Verdict, breakdown
from service.files import GRID, PictureFiles, Stalled, StorageThreads, picture_name, trajectory_name
from service.store.claims import BegunClaim, PictureStream
from service.store.jobs import JobStore
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from shared.pictures import marked_grid, png_bytes, read_png, sheet

log = get_logger(__name__)

RETRY_S = 1.0  # before storage is tried again that failed or did not answer
WARN_EVERY_S = 10.0

WORST = 20  # pictures of a score that its result shows besides

Pixels = NDArray[np.uint8]  # (H, W, 3), or (n, H, W, 3)


@dataclass(eq=False, kw_only=True)
class Work:
    """Finished pictures of one model, and jobs that lack only their grid and their end, each with its claim."""

    stream: PictureStream
    judged_by: MadeWith | None
    finished: list[tuple[BegunClaim, FinishedPicture]] = field(default_factory=list)
    complete: list[BegunClaim] = field(default_factory=list)
    judged_at: tuple[float, float] = (0.0, 0.0)  # begin and end, in seconds since 1970
    is_stored: bool = False  # but for grids


class Storer:
    """Does work in order, in a thread, so that no step of a batch waits for storage.

    While storage fails or hangs, all work waits here, leased to this worker, and is tried again: nothing is lost, and
    `problem` says why nothing moves.
    """

    def __init__(self, store: JobStore, files: PictureFiles, patience_s: float) -> None:
        """`patience_s`: how long a call of storage may take before it counts as hanging."""
        self.store, self.files, self.patience_s = store, files, patience_s
        self.problem = ""
        self.held = dict[Work, None]()  # all work that is not over, in order
        self._thread, self._calls = StorageThreads(1), StorageThreads()
        self._storing: Future[None] | None = None  # the last work submitted
        self._warned_at = -WARN_EVERY_S

    def count(self, stream: PictureStream) -> int:
        """Return how many pictures of a model are not stored yet."""
        return sum(len(work.finished) for work in list(self.held) if work.stream is stream and not work.is_stored)

    def submit(self, work: Work) -> None:
        self.held[work] = None
        self._storing = self._thread.submit(self._store)

    def check(self) -> None:
        """Raise what kept work from being done, but for storage."""
        if self._storing is not None and self._storing.done():
            self._storing.result()

    def _store(self) -> None:
        """Do all work that is held, and try again while storage fails."""
        while works := list(self.held):
            try:
                self._do(works)
                self.problem = ""
            except (OSError, Stalled) as error:
                self._warn(str(error))
                time.sleep(RETRY_S)

    def _warn(self, problem: str) -> None:
        self.problem = problem
        if time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            log.warning("pictures cannot be stored; retrying", storage=str(self.files.root), reason=problem)

    def _do(self, works: list[Work]) -> None:
        begun_at = time.time()
        new = [work for work in works if not work.is_stored]
        writes = list[Callable[[], None]]()
        for one in [one for work in new for _, one in work.finished]:
            job_id, index = one.picture.key
            if one.png:  # uploaded pictures are in storage already
                writes.append(partial(self.files.write, job_id, picture_name(index), one.png))
            if one.trajectory is not None:
                writes.append(partial(self.files.write, job_id, trajectory_name(index), one.trajectory))
        self._calls.all(writes, self.patience_s)
        for work in new:
            self._commit(work)
            if tracing.provider is not None:
                self._trace(work, begun_at)
        for work in works:
            if work.complete:
                self._complete(work)
            self.held.pop(work, None)  # it may have been left to other workers

    def _commit(self, work: Work) -> None:
        if work.finished:
            # A job ends with its only picture, if that is also its grid.
            results = {
                claim.job: score([one.verdict], 1)
                for claim, one in work.finished
                if claim.record.total == 1 and not claim.record.has_grid
            }
            complete, gone = self.store.commit(work.stream, work.finished, results)
            work.complete += complete
            self._calls.all([partial(self.files.remove, job_id) for job_id in gone], self.patience_s)
        work.is_stored = True

    def _trace(self, work: Work, begun_at: float) -> None:
        """Record in the traces of the pictures' jobs what they took. `begun_at`: when the first one was written."""
        records = {claim.job: claim.record for claim, _ in work.finished}
        for job_id, record in records.items():
            claimed_at = [claim.claimed_at for claim, _ in work.finished if claim.job == job_id]
            about: dict[str, str | int] = {"job_id": job_id, "pictures": len(claimed_at)}
            sampled = min(claimed_at), work.judged_at[0]
            times = {"sample": sampled, "judge": work.judged_at, "store": (begun_at, time.time())}
            for name, (begin, end) in times.items():
                tracing.span(name, record.traceparent, about, begin).end(int(end * tracing.NS))

    def _complete(self, work: Work) -> None:
        """Finish jobs that have all their pictures. Any worker may do it, and more than once."""
        results = [(claim, self._result(claim, work)) for claim in work.complete]
        gone = self.store.finish(work.stream, results)  # deleted, perhaps before the grid was written
        self._calls.all([partial(self.files.remove, job_id) for job_id in gone], self.patience_s)
        work.complete = []

    def _result(self, claim: BegunClaim, work: Work) -> JobResult | None:
        """Score a job and write its grid. None if it is not open or lacks pictures, or if it fails here."""
        record = claim.record
        try:
            verdicts = claim.verdicts or self.store.verdicts(record.id, record.total)
            if verdicts is None:
                return None
            with tracing.span("compose", record.traceparent, {"job_id": record.id}):
                result = score(verdicts, len(record.labels))
                if record.has_grid:
                    shown = self._pixels(record.id, result.best_indices(record), work)
                    grid = compose(record, result, verdicts, work.judged_by, shown)
                    self._calls.all([partial(self.files.write, record.id, GRID, grid)], self.patience_s)
            return result
        except (RedisError, OSError, Stalled):
            raise
        except Exception as error:
            log.error("result cannot be composed", job_id=record.id, exc_info=error)
            first_line = str(error).partition("\n")[0]
            self.store.fail(record.id, f"the result cannot be composed: {type(error).__name__}: {first_line}")
            return None

    def _pixels(self, job_id: str, indices: Sequence[int], work: Work) -> Pixels:
        """Return a job's pictures (n, H, W, 3). Those that were stored before this work are read from storage."""
        found = {one.picture.index: one.pixels for claim, one in work.finished if claim.job == job_id}
        missing = [index for index in indices if found.get(index) is None]
        reads = [partial(self.files.read, job_id, picture_name(index)) for index in missing]
        try:
            read = self._calls.all(reads, self.patience_s)
        except FileNotFoundError as error:
            raise LookupError(f"a picture is no longer in storage: {error}") from error
        found |= {index: decoded(png) for index, png in zip(missing, read, strict=True)}
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


def decoded(png: bytes) -> Pixels:
    try:
        return read_png(png)
    except OSError as error:  # Pillow's, not of storage, which would be tried again
        raise ValueError(f"a picture is damaged: {error}") from error


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
    if record.sent:
        return png_bytes(marked_grid(pixels, [verdict.exact for verdict in shown], columns))
    made_with = recipe.of_grid(record, result.best, shown, judged_by)
    return png_bytes(sheet(pixels, columns), made_with.text())
