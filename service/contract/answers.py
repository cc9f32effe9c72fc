"""A job as clients see it, built from what Redis has of it. Knows no Redis."""

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from service.contract.records import JobRecord, JobResult, Verdict
from service.contract.schemas import GenerateResult, Job, JobHead, PictureResult, Progress, Repeat, ScoreResult, Summary

SCORE_DIGITS = 6


def head(record: JobRecord, state: Mapping[str, str], done: int) -> JobHead:
    """Return a job without its result. `state`: status, times and error as stored; `done`: its finished pictures."""
    return JobHead.model_validate(_about(record, state, done))


def whole(
    record: JobRecord, state: Mapping[str, str], done: int, result: JobResult | None, best: Sequence[Verdict]
) -> Job:
    """Return a job with its result, if it has one; `best`: the verdicts of its best repeat and worst pictures."""
    about = _about(record, state, done)
    if result is not None:
        about["result"] = _result(record, result, best)
    return Job.model_validate(about)


def _about(record: JobRecord, state: Mapping[str, str], done: int) -> dict[str, Any]:
    """Return what clients see of a job's record and state. What has the same name in both is shown as it is."""
    times = {"created_at": record.created_at}
    times |= {name: float(state[name]) for name in ("started_at", "finished_at") if name in state}
    uploaded = {"seed": None, "options": None} if record.sent else {}
    return {
        **vars(record),
        "status": state["status"],
        "error": state.get("error"),
        "started_at": None,
        "finished_at": None,
        **{name: datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds") for name, at in times.items()},
        **uploaded,
        "progress": Progress(done=done, total=record.total),
        "result": None,
    }


def _result(record: JobRecord, result: JobResult, verdicts: Sequence[Verdict]) -> GenerateResult | ScoreResult:
    """Build the result that clients see; `verdicts`: those of its best repeat, then of its worst pictures."""
    shown = [
        PictureResult(
            **verdict.shown(SCORE_DIGITS, SCORE_DIGITS),
            labels=list(verdict.labels),
            seed=None if record.sent else verdict.seed,
            url=f"/jobs/{record.id}/images/{verdict.index}.png",
            trajectory_url=f"/jobs/{record.id}/trajectories/{verdict.index}.png" if record.trajectory else None,
        )
        for verdict in verdicts
    ]
    shown, worst = shown[: len(record.labels)], shown[len(record.labels) :]
    grid_url = f"/jobs/{record.id}/grid.png"
    if record.kind == "generate":
        return GenerateResult(**vars(result.repeats[0]), grid_url=grid_url, pictures=shown)
    seeds = [None if record.sent else record.seed + r for r in range(len(result.repeats))]
    repeats = [Repeat(**vars(scores), seed=seed) for scores, seed in zip(result.repeats, seeds, strict=True)]
    summaries: dict[str, Any] = {
        name: _summary([getattr(scores, name) for scores in result.repeats])
        for name in ("accuracy", "exact_match", "f1")
    }
    return ScoreResult(
        repeats=repeats,
        **summaries,
        best=result.best,
        by_label=result.by_label,
        by_objects=result.by_objects,
        worst=worst,
        grid_url=grid_url,
        pictures=shown,
    )


def _summary(values: Sequence[float]) -> Summary:
    return Summary(max=max(values), mean=statistics.fmean(values), std=statistics.pstdev(values))
