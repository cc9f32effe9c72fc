"""Writes docs/reliability.md and docs/dev/soak.md from the results of faults and soak: `python -m faults.report`.

Runs no trial.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import commit, cpu_name
from faults.cases import CASES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "faults" / "results.json"
SOAK = ROOT / "soak" / "results.json"
SWEPT = ROOT / "faults" / "anywhere" / "results.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
SERIES = ROOT / "docs" / "dev" / "soak.md"
WITHIN_S = 15.0  # the longest recovery allowed

HEAD = f"""\
# Reliability

Whatever process is killed, hangs or loses its connection:

- Every accepted job reaches exactly one terminal state, in its record and in its events ([jobs](api.md#jobs)).
- Every picture of a finished job is stored once and announced once, with the pixels that it has without a fault.
- A request that is retried with its `Idempotency-Key` is one job.
- Nothing is left in the queues. New requests have their pictures within {WITHIN_S:.0f} s of the end of the fault.

Not covered: a machine that loses power loses up to a second of writes (with `appendfsync always`, which is slower,
none). If Redis's own clock jumps ahead by more than `job_timeout_s`, open jobs fail as overdue. If it jumps back just
after a worker died, that worker's pictures wait for as long as the jump.

## Faults

`make faults` injects each fault into real processes, the API, two workers and Redis with an append-only file, and
checks all of the above for every accepted job. `python -m faults NAME` repeats one; `disk-full` needs root. A fault has
a row only if it passed. Checkpoints are toys; settings are the defaults unless a row names them.

*Recovery* begins when the fault occurs or, if it lasts, ends. It ends when a new request has its picture and all jobs
that were open have ended; the time that these jobs take without a fault is subtracted. *Wait* is the longest time until
a request was accepted, of a client that sends and retries one every quarter of a second. `faults/results.json` has
dates, commits and machines.

| fault | name | recovery, s | wait, s |
| --- | --- | --- | --- |
"""
TAIL = """
Faults occur in the middle of batches.
"""
SWEEP = """
## Every place

`make anywhere` finds each place that calls Redis, storage, networks, PNG or parsing, and each statement of the worker's
loop and of the hub, and fails it in real processes: with unforeseen errors, `OSError`s and time-outs, once, or for good
for one job, model or owner. A trial is confined if at most that job fails, saying why; all else is byte by byte as
without a fault; no lease, file or thread is left; and a new job finishes in time. Uploads for a job whose creation
Redis did not confirm stay until they expire, for the job may exist.

"""
SOAKED = """
## Soak

`make soak MINUTES=60` puts two APIs, two workers and Redis under a steady mixed load, while about
every minute a process is killed, restarted or paused for 2 to 15 s, or Redis is full. Then it checks all of the above
for every job, and that [memory does not grow](dev/soak.md). `python -m soak --seed N` repeats a load with its faults.

"""
SERIES_HEAD = """\
# The soak's series

What took how much memory in the last `make soak` ([reliability](../reliability.md#soak)).

A series of memory grows if the 95 % interval of its slope over the last half (Theil and Sen's) lies above 2 % an hour.
Four other soaks had no wrong job among 4,441. In each, one series grew: an API by 3.1 % an hour, Redis from 2.8 to
3.1 MiB, an API from 60.0 to 60.9 MiB, a worker by 3.3 % an hour.

"""


def read() -> dict[str, Any]:
    """Return the saved results, by case."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(name: str, result: dict[str, Any]) -> None:
    """Save a case's result and write the document."""
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": machine()}
    _write({**read(), name: {**result, **about}})


def forget(name: str) -> None:
    """Remove the result of a case that failed, and write the document."""
    _write({other: result for other, result in read().items() if other != name})


def keep_soak(result: dict[str, Any]) -> None:
    """Save a soak's result and write the document."""
    SOAK.write_text(json.dumps(result, indent=1) + "\n")
    _write(read())


def keep_sweep(result: dict[str, Any]) -> None:
    """Save what a sweep came to and write the document."""
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": machine()}
    SWEPT.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    DOCUMENT.write_text(document(read()))


def _write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    DOCUMENT.write_text(document(results))
    SERIES.write_text(series(json.loads(SOAK.read_text())))


def machine() -> str:
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def document(results: dict[str, Any]) -> str:
    """Return docs/reliability.md."""
    shown = {name: results[name] for name in CASES if name in results}
    rows = "".join(_row(name, result) for name, result in shown.items())
    if missing := [f"`{name}`" for name in CASES if name not in results]:
        rows += f"\nNot measured since they were last changed: {', '.join(missing)}.\n"
    return (
        HEAD
        + rows
        + TAIL
        + SWEEP
        + _swept(json.loads(SWEPT.read_text()) if SWEPT.exists() else None)
        + SOAKED
        + _soaked(json.loads(SOAK.read_text()))
    )


def _row(name: str, result: dict[str, Any]) -> str:
    figures = f"{result['recovery_s']:.1f} | {result['longest_wait_s']:.1f}"
    return f"| {CASES[name].description} | `{name}` | {figures} |\n"


def _swept(result: dict[str, Any] | None) -> str:
    """Return what the last sweep came to."""
    if result is None:
        return "Not run since it was last changed.\n"
    text = (
        f"{result['date']}, commit {result['commit']}, {result['machine']}: {result['swept']:,} of "
        f"{result['trials']:,} trials at {result['places']:,} places within {result['within_s']:.0f} s, "
        f"{len(result['rows'])} not confined. Chance did not lead to the other places.\n"
    )
    if result["rows"]:
        text += "\n| not confined | reason |\n| --- | --- |\n"
        trials: dict[str, list[str]] = {}  # by reason
        for trial, reason, _ in result["rows"]:
            trials.setdefault(reason, []).append(trial)
        for why, (one, *others) in trials.items():
            text += f"| {one}{f' and {len(others)} more' if others else ''} | {why} |\n"
    return text


def _soaked(result: dict[str, Any]) -> str:
    """Return the result of the last soak."""
    ended = ", ".join(f"{count:,} {state}" for state, count in result["ended"].items())
    return (
        f"{result['date']}, commit {result['commit']}, {result['machine']}, {result['minutes']:.0f} minutes, seed "
        f"{result['seed']}: {result['jobs']:,} jobs ({ended}), {result['pictures']:,} pictures, "
        f"{sum(result['strikes'].values())} faults, {result['retries']:,} retried requests, the longest wait until one "
        f"was accepted {result['longest_s']:.1f} s, {len(result['problems'])} problems.\n"
    )


def series(result: dict[str, Any]) -> str:
    """Return docs/dev/soak.md."""
    text = SERIES_HEAD
    text += "| series, last half | median | slope, % an hour | 95 % interval | |\n| --- | --- | --- | --- | --- |\n"
    for what, trend in result["trends"].items():
        shown = f"{trend['median']:,.0f}" if what.endswith("keys") else f"{trend['median'] / 2**20:,.1f} MiB"
        interval = f"{100 * trend['low']:+.1f} to {100 * trend['high']:+.1f}"
        flat = "flat" if trend["flat"] else "**grows**"
        text += f"| {what} | {shown} | {100 * trend['slope']:+.1f} | {interval} | {flat} |\n"
    return text


if __name__ == "__main__":
    _write(read())
