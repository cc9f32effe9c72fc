"""Completes jobs that have all of their pictures: scores, grid, and the move to `finished`. Knows no models."""

from collections.abc import Collection, Mapping

import numpy as np
from redis.exceptions import RedisError

from service.contract import recipe
from service.contract.recipe import MadeWith
from service.contract.records import JobRecord, JobResult, Scores, Verdict
from service.store.jobs import JobStore
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from shared.pictures import marked_grid, png_bytes, read_png, sheet

log = get_logger(__name__)

Pngs = Mapping[tuple[str, int], bytes]  # by job and index


def complete_jobs(store: JobStore, judged_by: MadeWith | None, job_ids: Collection[str], pngs: Pngs) -> None:
    """Finish jobs all of whose pictures are stored. Any worker may do it, and more than once.

    `pngs`: those at hand, which need not be fetched.
    """
    finished = {}
    for record, verdicts in store.open_verdicts(job_ids):
        try:
            with tracing.span("compose", record.traceparent, {"job_id": record.id}):
                result = score(verdicts, record)
                finished[record.id] = result, compose_grid(store, judged_by, record, result, verdicts, pngs)
        except RedisError:
            raise  # another worker may succeed
        except Exception as error:
            log.exception("result cannot be composed", **record.log_ids)
            store.fail(record.id, f"the result cannot be composed: {type(error).__name__}: {error}")
    store.finish(finished)


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
    at_hand: Pngs,
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
        pngs = store.pngs(record.id, [verdict.index for verdict in shown])
    pictures = np.stack([read_png(png) for png in pngs])  # (n, H, W, 3)
    columns = min(record.columns, n)
    if record.sent:
        return png_bytes(marked_grid(pictures, [verdict.exact for verdict in shown], columns))
    made_with = recipe.of_grid(record, result.best, shown, judged_by)
    return png_bytes(sheet(pictures, columns), made_with.text())
