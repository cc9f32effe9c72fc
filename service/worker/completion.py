"""Completes jobs that have all of their pictures: scores, grid, and the move to `finished`. Knows no models."""

import time
from collections.abc import Collection, Mapping

import numpy as np
from redis.exceptions import RedisError

from service.contract import recipe
from service.contract.kept import KeptJob
from service.contract.recipe import MadeWith
from service.contract.records import JobRecord, JobResult, Scores, Verdict
from service.results import files
from service.results.writer import Finished, ResultWriter, StorageAway
from service.store import keys
from service.store.jobs import JobStore
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from shared.pictures import marked_grid, png_bytes, read_png, sheet

log = get_logger(__name__)

Pngs = Mapping[tuple[str, int], bytes]  # by job and index


def complete_jobs(
    store: JobStore,
    judged_by: MadeWith | None,
    job_ids: Collection[str],
    pngs: Pngs,
    results: ResultWriter | None = None,
) -> None:
    """Finish jobs all of whose pictures are stored. Any worker may do it, and more than once.

    `pngs`: those at hand, which need not be fetched. `results`: keeps the jobs in storage; one whose pictures it cannot
    read now stays open, and `Runner.run` tries again.
    """
    finished: dict[str, tuple[JobResult, bytes]] = {}
    kept = list[Finished]()
    at = time.time()
    for record, verdicts in store.open_verdicts(job_ids):
        try:
            with tracing.span("compose", record.traceparent, {"job_id": record.id}):
                result = score(verdicts, record)
                grid = compose_grid(store, judged_by, record, result, verdicts, pngs, results)
                finished[record.id] = result, grid
        except RedisError:
            raise  # another worker may succeed
        except StorageAway as error:
            log.warning("grid cannot be composed yet", **record.log_ids, reason=str(error))
        except Exception as error:
            log.exception("result cannot be composed", **record.log_ids)
            store.fail(record.id, f"the result cannot be composed: {type(error).__name__}: {error}")
        else:
            if results is not None:
                kept.append(_to_keep(store, record, result, verdicts, grid, at))
    ids = results.keep_jobs(kept) if results is not None and kept else set()
    store.finish(finished, ids, at)
    if results is not None and ids:
        states = store.statuses(ids)
        owners = {one.job.record.id: one.job.record.owner for one in kept}
        # A job that was cancelled or deleted in between has no result.
        results.remove_jobs([(owners[job_id], job_id) for job_id in ids if states[job_id] != "finished"])


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


def score(verdicts: list[Verdict], record: JobRecord) -> JobResult:
    """Score each repeat as `trainer score` does. The best has the highest accuracy, then the highest exact match."""
    n = len(record.labels)
    repeats = []
    for r in range(record.repeats):
        part = verdicts[r * n : (r + 1) * n]
        asked = [len(set(verdict.labels)) for verdict in part]
        hits = sum(round(verdict.accuracy * k) for verdict, k in zip(part, asked, strict=True))
        exact, f1 = sum(verdict.exact for verdict in part), sum(verdict.f1 for verdict in part)
        repeats.append(Scores(accuracy=hits / sum(asked), exact_match=exact / n, f1=f1 / n))
    best = max(range(record.repeats), key=lambda r: (repeats[r].accuracy, repeats[r].exact_match, -r))
    return JobResult(repeats=repeats, best=best)


def compose_grid(
    store: JobStore, judged_by: MadeWith | None, record: JobRecord, result: JobResult, verdicts: list[Verdict],
    at_hand: Pngs, results: ResultWriter | None = None,
) -> bytes:  # fmt: skip
    """Return the PNG of the best repeat's pictures, or for a single picture its index.

    Uploaded pictures are marked as right or wrong.
    """
    n = len(record.labels)
    shown = [verdicts[result.best * n + i] for i in range(n)]
    if n == 1 and not record.sent:
        return str(shown[0].index).encode()
    pngs = [at_hand[key] for verdict in shown if (key := (record.id, verdict.index)) in at_hand]
    if len(pngs) < n:
        pngs = _fetch(store, record, [verdict.index for verdict in shown], results)
    pictures = np.stack([read_png(png) for png in pngs])  # (n, H, W, 3)
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
    left = [index for index in indices if index not in found]
    found |= zip(left, results.read_pictures(record.owner, record.id, left), strict=True)
    return [found[index] for index in indices]
