"""Writes docs/reliability.md from `results.json`, one row per fault: `python -m faults.report`. Runs no trial."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import commit, cpu_name
from faults.cases import CASES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "faults" / "results.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
WITHIN_S = 15.0  # the longest recovery allowed

HEAD = """\
# Reliability

`make faults` injects faults into a running service and checks every job that it accepted. The service consists of real
processes: Redis with an append-only file, the API and two workers, with the default settings except for toy checkpoints
and batches of 16 pictures. `python -m faults NAME` repeats one fault and replaces its row. A fault with other settings
names them; those of storage use an S3 server behind a proxy, and `disk-full` mounts a small file system, which needs
root. The flood runs with one worker, API keys, 500 pending pictures per owner, and no rate limit, which would refuse
most of it.

A fault has a row only if, after it:

- Every accepted job reached exactly one terminal state, by one of the ways in [jobs.md](jobs.md), in its record and in
  its events.
- Every picture of a finished job was stored once and announced once. Pictures and grid equal, pixel by pixel, those of
  the same requests without a fault. Those of the release before are compared
  by their sizes alone, since it computes its networks in another library.
- A request that was retried with its `Idempotency-Key` is one job.
- Nothing is left in the queues.

States and pictures are read from Redis's append-only file, which has every change in order, so that no short-lived
state is missed.

| fault | name | recovery, s | longest wait, s | jobs | pictures | details |
| --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = f"""
- **recovery**: from the fault, or from its end if it lasts, until a new request has its picture and all jobs that were
  open at the fault have ended, less the time that the same jobs take without a fault on the same machine. At most
  {WITHIN_S:.0f} s are allowed. Rows without the detail "without a fault" are older: nothing was deducted.
- **longest wait**: the longest time until a request was accepted, for a client that sends one every quarter of a second
  and retries it.
- **jobs**, **pictures**: the number that was checked.

Promises with tests of their own:

| promise | test |
| --- | --- |
| two versions share Redis | `tests/service/contract/test_stored.py` |
| a worker that hangs ends itself | `tests/service/test_watchdog.py` |
| a picture is the same alone and in any batch, on any CPU | `tests/shared/test_openvino.py` |
| simultaneous requests cannot pass a limit together | `tests/service/store/test_admission.py` |
| the API follows a failover although its connections stay open | `tests/service/store/test_connection.py` |
| no job waits for another model's long job | `tests/service/worker/test_wanted_models.py` |
| a step that raises ends only the picture that breaks it | `tests/service/worker/test_engine.py` |
| a suspected picture shares its worker with suspects only | `tests/service/worker/test_runner_failures.py` |
| while storage hangs, workers use their copies | `tests/service/worker/test_checkpoint_cache.py` |
| a job finishes only while Redis has all of its pictures | `tests/service/store/test_jobs.py` |
| pictures of dead workers come before new ones | `tests/service/store/test_claims.py` |
| a model that kills the workers that load it fails its jobs | `tests/service/worker/test_runner_failures.py` |
| an unreadable picture stops nobody | `tests/service/store/test_claims.py` |
| an unreadable record stops nobody | `tests/service/worker/test_runner_failures.py` |

Not covered: a machine that loses power loses up to a second of writes (`appendfsync everysec`; `always` loses nothing
and is slower). If Redis's own clock jumps ahead by more than `job_timeout_s`, open jobs fail as overdue. If it jumps
back just after a worker died, that worker's pictures wait for as long as the jump.

Measured:

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


def _write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    DOCUMENT.write_text(document(results))


def machine() -> str:
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def document(results: dict[str, Any]) -> str:
    """Return docs/reliability.md."""
    shown = {name: results[name] for name in CASES if name in results}
    rows = "".join(_row(name, result) for name, result in shown.items())
    if missing := [f"`{name}`" for name in CASES if name not in results]:
        rows += f"\nNot measured since they were last changed: {', '.join(missing)}.\n"
    measured: dict[str, list[str]] = {}
    for name, result in shown.items():
        measured.setdefault(f"{result['date']}, commit {result['commit']}, {result['machine']}", []).append(name)
    return HEAD + rows + TAIL + "".join(f"- {about}: {', '.join(names)}\n" for about, names in measured.items())


def _row(name: str, result: dict[str, Any]) -> str:
    details = "; ".join(f"{what}: {value:g}" for what, value in result["figures"].items())
    figures = f"{result['recovery_s']:.1f} | {result['longest_wait_s']:.1f} | {result['jobs']} | {result['pictures']}"
    return f"| {CASES[name].description} | `{name}` | {figures} | {details} |\n"


if __name__ == "__main__":
    _write(read())
