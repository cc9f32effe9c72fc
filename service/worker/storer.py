"""Stores finished pictures and completes jobs: files first, then verdicts in Redis, then scores and grid.

Knows no networks and no queues.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from redis.exceptions import RedisError

from service import pictures
from service.contract.recipe import MadeWith
from service.contract.records import FinishedPicture, JobResult
from service.pictures import PictureFiles
from service.storage_threads import Stalled, StorageThreads
from service.store.claims import Claim, PictureStream
from service.store.jobs import JobStore
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.worker import grids
from service.worker.grids import Pixels

log = get_logger(__name__)

RETRY_S = 1.0  # before storage is tried again that failed or did not answer
WARN_EVERY_S = 10.0

T = TypeVar("T")


@dataclass(eq=False, kw_only=True)
class Work:
    """Finished pictures of one model, each with its stream entry, and jobs that lack only their grid and their end."""

    stream: PictureStream
    judged_by: MadeWith | None
    finished: list[tuple[str, FinishedPicture]] = field(default_factory=list)
    complete: list[Claim] = field(default_factory=list)
    judged_at: tuple[float, float] = (0.0, 0.0)  # begin and end, in seconds since 1970
    stored_at: tuple[float, float] = (0.0, 0.0)
    is_stored: bool = False  # but for grids
    is_over: bool = False

    @property
    def pictures(self) -> list[FinishedPicture]:
        return [picture for _, picture in self.finished]

    @property
    def entries(self) -> list[str]:
        """The stream entries that this worker holds for it. Safe in another thread."""
        of_pictures = [] if self.is_stored else [entry for entry, _ in self.finished]
        return of_pictures + [claim.entry for claim in list(self.complete)]


class Storer:
    """Does work in order, in a thread, so that no step of a batch waits for storage.

    While storage fails or hangs, all work waits here, leased to this worker, and is tried again: nothing is lost, and
    `problem` says why nothing moves. Only the loop's thread changes `held`, all work that is not over.
    """

    def __init__(self, store: JobStore, files: PictureFiles, patience_s: float) -> None:
        """`patience_s`: how long a call of storage may take before it counts as hanging."""
        self.store, self.files, self.patience_s = store, files, patience_s
        self.problem = ""
        self.held = list[Work]()
        self._thread, self._calls = StorageThreads(1), StorageThreads()
        self._failure: BaseException | None = None
        self._warned_at = -WARN_EVERY_S

    @property
    def busy(self) -> bool:
        return bool(self.held)

    def count(self, stream: PictureStream) -> int:
        """Return how many pictures of a model are not stored yet."""
        return sum(len(work.finished) for work in self.held if work.stream is stream and not work.is_stored)

    def submit(self, work: Work) -> None:
        self.held = [*self.held, work]
        self._thread.submit(self._store)

    def collect(self) -> list[Work]:
        """Return what is over. Raises what stopped the thread, but for storage."""
        if self._failure is not None:
            failure, self._failure, self.held = self._failure, None, []
            raise failure
        over = [work for work in self.held if work.is_over]
        self.held = [work for work in self.held if work not in over]
        return over

    def _store(self) -> None:
        """Do all work that is held, and try again while storage fails."""
        while works := [work for work in self.held if not work.is_over]:
            try:
                self._do(works)
                self.problem = ""
            except (OSError, Stalled) as error:
                self._warn(str(error))
                time.sleep(RETRY_S)
            except BaseException as error:
                self._failure = error
                return

    def _warn(self, problem: str) -> None:
        self.problem = problem
        if time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            log.warning("pictures cannot be stored; retrying", storage=str(self.files.root), reason=problem)

    def _do(self, works: list[Work]) -> None:
        new = [work for work in works if not work.is_stored]
        self._write([one for work in new for one in work.pictures])
        for work in new:
            self._commit(work)
        for work in works:
            self._complete(work)
            work.is_over = True

    def _write(self, finished: Iterable[FinishedPicture]) -> None:
        """Write what was sampled; uploaded pictures are in storage already."""
        writes = list[Callable[[], None]]()
        for one in finished:
            job_id, index = one.picture.key
            if one.png:
                writes.append(partial(self.files.write, job_id, pictures.picture(index), one.png))
            if one.trajectory is not None:
                writes.append(partial(self.files.write, job_id, pictures.trajectory(index), one.trajectory))
        self._all(writes)

    def _commit(self, work: Work) -> None:
        begun_at = time.time()
        if work.finished:
            leased, gone = self.store.commit(work.stream, work.finished, grids.results_alone(work.pictures))
            work.complete += [claim for claim in leased if claim.picture is None]
            work.stream.release([claim.entry for claim in leased if claim.picture is not None])
            self._all([partial(self.files.remove, job_id) for job_id in gone])
        work.is_stored = True
        work.stored_at = begun_at, time.time()

    def _complete(self, work: Work) -> None:
        """Finish jobs that have all their pictures. Any worker may do it, and more than once."""
        results = list[tuple[Claim, JobResult]]()
        for claim in work.complete:
            result = self._result(claim.job, work)
            if result is None:
                work.stream.discard([claim.entry])
            else:
                results.append((claim, result))
        ended = self.store.finish(work.stream, results)
        self._remove_gone(claim.job for claim in work.complete if claim.job not in ended)
        work.complete = []

    def _remove_gone(self, job_ids: Iterable[str]) -> None:
        """Remove the files of those jobs that were deleted, perhaps before the last one was written."""
        gone = [job_id for job_id, status in self.store.statuses(job_ids).items() if status is None]
        self._all([partial(self.files.remove, job_id) for job_id in gone])

    def _result(self, job_id: str, work: Work) -> JobResult | None:
        """Score a job and write its grid. None if it is not open or lacks pictures, or if it fails here."""
        try:
            complete = self.store.complete(job_id)
            if complete is None:
                return None
            record, verdicts = complete
            with tracing.span("compose", record.traceparent, {"job_id": job_id}):
                result = grids.score(verdicts, len(record.labels))
                if record.has_grid:
                    shown = self._pixels(job_id, result.best_indices(record), work)
                    grid = grids.compose(record, result, verdicts, work.judged_by, shown)
                    self._all([partial(self.files.write, job_id, pictures.GRID, grid)])
            return result
        except (RedisError, OSError, Stalled):
            raise
        except Exception as error:
            log.error("result cannot be composed", job_id=job_id, exc_info=error)
            first_line = str(error).partition("\n")[0]
            self.store.fail(job_id, f"the result cannot be composed: {type(error).__name__}: {first_line}")
            return None

    def _pixels(self, job_id: str, indices: Sequence[int], work: Work) -> Pixels:
        """Return a job's pictures (n, H, W, 3). Those that were stored before this work are read from storage."""
        found = {one.picture.index: one.pixels for one in work.pictures if one.picture.job == job_id}
        missing = [index for index in indices if found.get(index) is None]
        try:
            read = self._all([partial(self.files.read, job_id, pictures.picture(index)) for index in missing])
        except FileNotFoundError as error:
            raise LookupError(f"a picture is no longer in storage: {error}") from error
        found |= {index: grids.decoded(png) for index, png in zip(missing, read, strict=True)}
        return np.stack([found.pop(index) for index in indices])  # each is in memory once

    def _all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make calls to storage at the same time. OSError if one fails, Stalled if one hangs."""
        return self._calls.all(calls, self.patience_s) if calls else []

    def renew(self) -> None:
        """Renew the leases of all work that is not over. Safe in another thread."""
        for work in self.held:
            work.stream.renew(work.entries)

    def release(self) -> None:
        """Leave all work that is not over to other workers."""
        for work in self.held:
            work.stream.release(work.entries)
        self.held = []
