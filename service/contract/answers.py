"""A job as clients see it, built from its records, which may lie in Redis or in storage. Knows neither."""

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from service.contract.recipe import shown_distances, shown_scores
from service.contract.records import JobRecord, JobResult, Verdict
from service.contract.schemas import (
    GenerateResult,
    Job,
    JobHead,
    PictureResult,
    Progress,
    Repeat,
    ScoreResult,
    Summary,
)

SCORE_DIGITS = 6


def head(record: JobRecord, state: Mapping[str, str], done: int) -> JobHead:
    """Return a job without its result. `state`: status, times and error as stored; `done`: its finished pictures."""
    return JobHead(**_head(record, state, done))


def whole(
    record: JobRecord, state: Mapping[str, str], done: int, result: JobResult | None, best: Sequence[Verdict]
) -> Job:
    """Return a job with its result, if it has one; `best`: the verdicts of its best repeat."""
    requested = {name: getattr(record, name) for name in ("labels", "layouts", "first", "trajectory", "columns")}
    shown = None if result is None else _result(record, result, best)
    return Job(**_head(record, state, done), **requested, result=shown)


def _head(record: JobRecord, state: Mapping[str, str], done: int) -> dict[str, Any]:
    return {
        "id": record.id,
        "kind": record.kind,
        "status": state["status"],
        "created_at": _iso(record.created_at),
        "started_at": _iso(float(state["started_at"])) if "started_at" in state else None,
        "finished_at": _iso(float(state["finished_at"])) if "finished_at" in state else None,
        "model": record.model,
        "digest": record.digest,
        "seed": None if record.sent else record.seed,
        "options": None if record.sent else record.options,
        "progress": Progress(done=done, total=record.total),
        "error": state.get("error"),
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _picture(record: JobRecord, verdict: Verdict) -> PictureResult:
    return PictureResult(
        labels=list(verdict.labels),
        seed=None if record.sent else verdict.seed,
        accuracy=verdict.accuracy,
        exact=verdict.exact,
        f1=verdict.f1,
        scores=shown_scores(verdict, SCORE_DIGITS),
        distances=shown_distances(verdict, SCORE_DIGITS),
        url=f"/jobs/{record.id}/images/{verdict.index}.png",
        trajectory_url=f"/jobs/{record.id}/trajectories/{verdict.index}.png" if record.trajectory else None,
    )


def _summary(values: Sequence[float]) -> Summary:
    return Summary(max=max(values), mean=statistics.fmean(values), std=statistics.pstdev(values))


def _result(record: JobRecord, result: JobResult, verdicts: Sequence[Verdict]) -> GenerateResult | ScoreResult:
    """Build the result that clients see; `verdicts`: those of its best repeat."""
    shown = [_picture(record, verdict) for verdict in verdicts]
    grid_url = f"/jobs/{record.id}/grid.png"
    if record.kind == "generate":
        return GenerateResult(**result.repeats[0].model_dump(), grid_url=grid_url, pictures=shown)
    return ScoreResult(
        repeats=[
            Repeat(seed=None if record.sent else record.seed + r, **scores.model_dump())
            for r, scores in enumerate(result.repeats)
        ],
        accuracy=_summary([scores.accuracy for scores in result.repeats]),
        exact_match=_summary([scores.exact_match for scores in result.repeats]),
        f1=_summary([scores.f1 for scores in result.repeats]),
        best=result.best,
        by_label=result.by_label,
        by_objects=result.by_objects,
        grid_url=grid_url,
        pictures=shown,
    )
