"""docs/reliability.md, made of `results.json`: a row for each fault, measured when and where it says.

`python -m faults.report` writes it anew from what was measured.
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
DOCUMENT = ROOT / "docs" / "reliability.md"
WITHIN_S = 15.0  # what recovery may take

HEAD = """\
# Reliability

Made by `make faults`: real processes (Redis with an append-only file, the API, two workers, all with the default
settings but for toy checkpoints, in batches of 16 pictures), real faults. `python -m faults NAME` does one of them and
replaces its row. The flood meets one worker, API keys, no rate limit, which would refuse most of it, and a share of 500
waiting pictures for each owner.

After each of them, every accepted job had reached exactly one terminal state, by one way through the states of
[jobs.md](jobs.md), both in its record and in the events that clients are told. Every finished job had each picture
stored and told exactly once; pictures and grid were equal byte by byte to those of the same requests without a fault. A
request sent again with its `Idempotency-Key` was one job. Nothing was left over in queues. States and pictures are read
from Redis's append-only file, which has every change in order, so that nothing passes unseen between two looks. A fault
that shows anything else has no row.

| fault | name | recovery, s | longest wait to be accepted, s | jobs | pictures | besides |
| --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = f"""
**recovery**: from the fault, or from its end where it lasts, until a request sent after it has its picture and all jobs
that were open at the fault have ended; of it, some seconds are these jobs' work. At most {WITHIN_S:.0f} s are allowed.
**longest wait to be accepted**: of a client that asks for a picture every quarter of a second all along, and for each
again until it is accepted. **jobs** and **pictures**: all that were checked.

What is not covered: a machine that loses power loses up to a second of what Redis was told (`appendfsync everysec`;
`always` loses nothing and is slower). Where Redis's own clock jumps ahead by more than `job_timeout_s`, open jobs fail
as overdue. Where it jumps back, pictures of a worker that died just before wait for as long as it jumped.

Measured:

"""


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(name: str, result: dict[str, Any]) -> None:
    """Puts a case's result in the place of its last one, here and in the document."""
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": machine()}
    _write({**read(), name: {**result, **about}})


def forget(name: str) -> None:
    """A case that went wrong has no result."""
    _write({other: result for other, result in read().items() if other != name})


def _write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    DOCUMENT.write_text(document(results))


def machine() -> str:
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def document(results: dict[str, Any]) -> str:
    """The whole document."""
    shown = {name: results[name] for name in CASES if name in results}
    rows = "".join(_row(name, result) for name, result in shown.items())
    measured: dict[str, list[str]] = {}
    for name, result in shown.items():
        measured.setdefault(f"{result['date']}, commit {result['commit']}, {result['machine']}", []).append(name)
    return HEAD + rows + TAIL + "".join(f"- {about}: {', '.join(names)}\n" for about, names in measured.items())


def _row(name: str, result: dict[str, Any]) -> str:
    besides = "; ".join(f"{what}: {value:g}" for what, value in result["figures"].items())
    figures = f"{result['recovery_s']:.1f} | {result['longest_wait_s']:.1f} | {result['jobs']} | {result['pictures']}"
    return f"| {CASES[name].what} | `{name}` | {figures} | {besides} |\n"


if __name__ == "__main__":
    _write(read())
