"""Stores finished pictures and completes jobs that have all of theirs: scores, grid, and the move to `finished`.

In a thread if results are kept in storage, which may be slow. Knows no networks and no leases.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from redis.exceptions import RedisError

from service.contract import recipe
from service.contract.kept import KeptJob
from service.contract.recipe import MadeWith
from service.contract.records import ACTIVE, FinishedPicture, JobRecord, JobResult, Scores, Verdict
from service.results import files
from service.results.writer import Finished, ResultWriter, StorageAway
from service.storage_threads import StorageThreads, settle
from service.store import keys
from service.store.jobs import JobStore
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from shared.pictures import marked_grid, png_bytes, read_png, sheet

log = get_logger(__name__)

RECENT_BYTES = 64 * 2**20  # of pixels: 290 pictures of 320x240
GRIDS_AT_ONCE = 4  # most of the time goes to zlib, which lets other threads run

Pixels = NDArray[np.uint8]  # (H, W, 3)
AtHand = Mapping[tuple[str, int], Pixels]  # by job and index
Times = tuple[float, float]  # begin and end, in seconds since 1970


@dataclass(eq=False, kw_only=True)
class Work:
    """Finished pictures of one stream, each with its entry, or `jobs` that lack only their end."""

    judged_by: MadeWith | None
    stream: str = ""
    finished: list[tuple[str, FinishedPicture]] = field(default_factory=list)
    jobs: set[str] = field(default_factory=set)
    judged_at: Times = (0.0, 0.0)
    stored_at: Times = (0.0, 0.0)

    @property
    def pictures(self) -> list[FinishedPicture]:
        return [picture for _, picture in self.finished]


class RecentPixels(OrderedDict[tuple[str, int], Pixels]):
    """The pixels of the last pictures, by job and index, so that grids need not decode the PNGs again.

    Pictures of one job may end in many batches, since jobs take turns. The first of each job is left out: it may be the
    only one, which needs no grid. They are copies, because the pixels are views of a whole batch.
    """

    def add(self, finished: Iterable[FinishedPicture]) -> None:
        for one in finished:
            if one.pixels is not None and one.picture.index > 0:
                self[one.picture.key] = one.pixels.copy()
        size = sum(pixels.nbytes for pixels in self.values())
        while size > RECENT_BYTES:
            size -= self.popitem(last=False)[1].nbytes

    def forget(self, job_ids: Collection[str]) -> None:
        for key in [key for key in self if key[0] in job_ids]:
            del self[key]


class Storer:
    """Does work in order, one piece after the other; all that arrives while storage is slow is the next piece."""

    def __init__(self, store: JobStore, results: ResultWriter | None) -> None:
        self.store, self.results = store, results
        self._start = at_once if results is None else StorageThreads(1).submit
        self._waiting = list[Work]()
        self._begun = list[Work]()
        self._outcome: Future[None] | None = None
        self._recent = RecentPixels()

    def submit(self, work: Work) -> None:
        """Note work, which the next `collect` begins."""
        self._waiting.append(work)

    def collect(self) -> tuple[list[Work], BaseException | None]:
        """Begin work if none is in progress. Return what is over, and the error that it ended with, if any."""
        if self._outcome is None and self._waiting:
            self._begun, self._waiting = self._waiting, []
            self._outcome = self._start(partial(self._store, self._begun))
        if self._outcome is None or not self._outcome.done():
            return [], None
        error, self._outcome = self._outcome.exception(), None
        return self._begun, error

    def _store(self, works: list[Work]) -> None:
        begun_at = time.time()
        pictures = [picture for work in works for picture in work.pictures]
        owners = self.store.owners({one.picture.job for one in pictures}) if self.results is not None else {}
        kept, results = self._keep(pictures, owners), {} if self.results is not None else results_alone(pictures)
        for work in works:
            if work.finished:
                work.jobs |= self.store.commit(work.stream, work.finished, kept, results)
            work.stored_at = begun_at, time.time()
        if self.results is not None and (gone := owners.keys() - self.store.owners(owners).keys()):
            self.results.remove_jobs([(owners[job_id], job_id) for job_id in gone])  # deleted meanwhile
        self._recent.add(pictures)
        for judged_by in {work.judged_by for work in works if work.jobs}:
            job_ids = set[str]().union(*(work.jobs for work in works if work.judged_by == judged_by))
            complete_jobs(self.store, judged_by, job_ids, self._recent, self.results)
            self._recent.forget(job_ids)

    def _keep(self, finished: list[FinishedPicture], owners: Mapping[str, str]) -> set[tuple[str, int]]:
        """Write sampled pictures to storage, if results are kept there; return those that need no place in Redis.

        `owners`: of the jobs that exist.
        """
        sampled = [one for one in finished if one.picture.run_seed is not None]  # Redis has the uploaded ones already
        if self.results is None or not sampled:
            return set()
        return self.results.keep_pictures(sampled, owners)


def at_once(work: Callable[[], None]) -> Future[None]:
    """Do the work here, and return its outcome."""
    outcome: Future[None] = Future()
    settle(outcome, work)
    return outcome


def complete_jobs(
    store: JobStore,
    judged_by: MadeWith | None,
    job_ids: Collection[str],
    at_hand: AtHand,
    results: ResultWriter | None,
) -> None:
    """Finish jobs all of whose pictures are stored. Any worker may do it, and more than once.

    `at_hand`: pictures that need not be fetched. `results`: keeps the jobs in storage; one whose pictures it cannot
    read now stays open, and `Runner.run` tries again.
    """
    finished: dict[str, tuple[JobResult, bytes]] = {}
    kept = list[Finished]()
    at = time.time()
    complete = _with_verdicts(store, job_ids)

    def composed(job: tuple[JobRecord, list[Verdict]]) -> tuple[JobResult, bytes] | Exception:
        record, verdicts = job
        try:
            with tracing.span("compose", record.traceparent, {"job_id": record.id}):
                result = score(verdicts, len(record.labels))
                return result, compose_grid(store, judged_by, record, result, verdicts, at_hand, results)
        except Exception as error:
            return error

    number = GRIDS_AT_ONCE if results is None else 1  # `results` is for one thread at a time
    with ThreadPoolExecutor(number, "grid") as threads:
        outcomes = list(threads.map(composed, complete))
    for (record, verdicts), outcome in zip(complete, outcomes, strict=True):
        match outcome:
            case RedisError():
                raise outcome  # another worker may succeed
            case StorageAway():
                log.warning("grid cannot be composed yet", **record.log_ids, reason=str(outcome))
            case Exception():
                log.error("result cannot be composed", **record.log_ids, exc_info=outcome)
                store.fail(record.id, f"the result cannot be composed: {type(outcome).__name__}: {outcome}")
            case result, grid:
                finished[record.id] = result, grid
                if results is not None:
                    kept.append(_to_keep(store, record, result, verdicts, grid, at))
    ids = results.keep_jobs(kept) if results is not None and kept else set()
    store.finish(finished, ids, at)
    if results is not None and ids:
        states = store.statuses(ids)
        owners = {one.job.record.id: one.job.record.owner for one in kept}
        # A job that was cancelled or deleted in between has no result. One that is still open has lost verdicts, as
        # after a failover, and will finish yet.
        late = {job_id: states[job_id] for job_id in ids if states[job_id] != "finished"}
        results.remove_jobs([(owners[job_id], job_id) for job_id, state in late.items() if state not in ACTIVE])
        results.reopen_jobs([(owners[job_id], job_id) for job_id, state in late.items() if state in ACTIVE])


def _with_verdicts(store: JobStore, job_ids: Collection[str]) -> list[tuple[JobRecord, list[Verdict]]]:
    """Return the open jobs that have all pictures. One whose verdicts cannot be read fails, and holds up no other."""
    try:
        return store.open_verdicts(job_ids)
    except ValueError:
        complete = []
        for job_id in job_ids:
            try:
                complete += store.open_verdicts([job_id])
            except ValueError as error:
                log.error("verdicts cannot be read", job_id=job_id, exc_info=error)
                store.fail(job_id, f"a verdict cannot be read: {error}")
        return complete


def _to_keep(
    store: JobStore, record: JobRecord, result: JobResult, verdicts: list[Verdict], grid: bytes, at: float
) -> Finished:
    """Return a job as it goes to storage, with those of its pictures that only Redis has."""
    job = KeptJob(
        record=record,
        started_at=store.started_at(record.id),
        finished_at=at,
        result=result,
        verdicts=tuple(verdicts),
    )
    written = {_file_name(field): png for field, png in store.all_pngs(record.id).items() if field != keys.GRID}
    if job.grid is None:
        written[files.GRID] = grid
    return Finished(job, written)


def _file_name(field: str) -> str:
    """Return the name in storage of what job:ID:png has in a field."""
    return files.picture(int(field)) if field.isdigit() else files.trajectory(int(field.partition(":")[2]))


def results_alone(finished: Iterable[FinishedPicture]) -> dict[tuple[str, int], JobResult]:
    """Return the results of jobs that have no other picture, as far as one can see: sampled pictures of index 0."""
    firsts = [one for one in finished if one.picture.index == 0 and one.picture.run_seed is not None]
    return {one.picture.key: score([one.verdict], 1) for one in firsts}


def score(verdicts: Sequence[Verdict], n: int) -> JobResult:
    """Score each repeat of n pictures as `trainer score` does. The best has the highest accuracy, then exact match."""
    repeats = []
    for first in range(0, len(verdicts), n):
        part = verdicts[first : first + n]
        asked = [len(set(verdict.labels)) for verdict in part]
        hits = sum(round(verdict.accuracy * k) for verdict, k in zip(part, asked, strict=True))
        exact, f1 = sum(verdict.exact for verdict in part), sum(verdict.f1 for verdict in part)
        repeats.append(Scores(accuracy=hits / sum(asked), exact_match=exact / n, f1=f1 / n))
    best = max(range(len(repeats)), key=lambda r: (repeats[r].accuracy, repeats[r].exact_match, -r))
    return JobResult(repeats=repeats, best=best)


def compose_grid(
    store: JobStore, judged_by: MadeWith | None, record: JobRecord, result: JobResult, verdicts: list[Verdict],
    at_hand: AtHand, results: ResultWriter | None,
) -> bytes:  # fmt: skip
    """Return the PNG of the best repeat's pictures, or for a single picture its index.

    Uploaded pictures are marked as right or wrong.
    """
    n = len(record.labels)
    shown = [verdicts[result.best * n + i] for i in range(n)]
    if n == 1 and not record.sent:
        return str(shown[0].index).encode()
    found = {one.index: at_hand[record.id, one.index] for one in shown if (record.id, one.index) in at_hand}
    if left := [one.index for one in shown if one.index not in found]:
        found |= zip(left, map(read_png, _fetch(store, record, left, results)), strict=True)
    pictures = np.stack([found[one.index] for one in shown])  # (n, H, W, 3)
    columns = min(record.columns, n)
    if record.sent:
        return png_bytes(marked_grid(pictures, [verdict.exact for verdict in shown], columns))
    made_with = recipe.of_grid(record, result.best, shown, judged_by)
    return png_bytes(sheet(pictures, columns), made_with.text())


def _fetch(store: JobStore, record: JobRecord, indices: list[int], results: ResultWriter | None) -> list[bytes]:
    """Return pictures from Redis, or from storage those that Redis lacks. KeyError if one is in neither."""
    if results is None:
        return store.pngs(record.id, indices)
    found = store.some_pngs(record.id, indices)
    if left := [index for index in indices if index not in found]:  # else storage is not asked, which may hang
        found |= zip(left, results.read_pictures(record.owner, record.id, left), strict=True)
    return [found[index] for index in indices]
