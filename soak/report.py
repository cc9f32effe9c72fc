"""Writes docs/soak.md from `results.json`: `python -m soak.report`. Runs nothing."""

import json
from pathlib import Path
from typing import Any

from soak.load import BODIES, EVERY_S, KINDS
from soak.memory import EVERY_S as SAMPLED_EVERY_S
from soak.stack import KEEP_S
from soak.trend import ALLOWED_PER_HOUR, BLOCK_S, JUDGED_MINUTES, RESAMPLES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "soak" / "results.json"
DOCUMENT = ROOT / "docs" / "soak.md"

HEAD = f"""\
# Soak

`make soak MINUTES=60` keeps a service of real processes under a steady mixed load while faults strike at random times,
and checks every job that it accepted. The service consists of Redis, two APIs, two workers and the sender of webhooks,
with toy checkpoints. Results expire after {KEEP_S} s, so that the number of keys can be flat.
`python -m soak --seed N` repeats the load and the faults of a seed.

**Load.** A request every {EVERY_S:.0f} s, from one of two owners: {len(BODIES)} bodies of 1 to 8 pictures, for two
models, with several samplers, `/score` of a test file and of uploaded pictures. There are {len(KINDS)} kinds of
clients; the result names them. Every client retries with the same `Idempotency-Key`, at either API, until it has its
answer.

**Faults.** One about every minute: `kill` is SIGKILL, `restart` SIGTERM, `pause` SIGSTOP for 2 to 15 s, `fill` a Redis
at its memory limit for as long. One API and one worker are paused but never killed, so that each has one long series.

**Checks.** Each accepted job reached one terminal state, and finished unless its client cancelled it. Each picture of a
finished job was stored once, and equals the one that the same request had before the first fault. Nothing was stored
after a job's end. Clients got the pictures, the webhooks and one job for one `Idempotency-Key`. When all jobs have
expired, Redis holds no key of theirs. Except for the clients' own observations, this is read from Redis's append-only
file, which has every change in order.

**Memory.** A sample every {SAMPLED_EVERY_S:.0f} s, except during faults. The slope is Theil and Sen's over the last
half, with a 95 % interval from {RESAMPLES} resamples of its residuals in blocks of {BLOCK_S:.0f} s. A series grows if
the interval's lower bound is above {ALLOWED_PER_HOUR:.0%} an hour. Processes that were killed in that half are not
judged, since they grow while they warm up; nor is any of a soak of less than {JUDGED_MINUTES:.0f} minutes. A process's
memory is its anonymous memory (`RssAnon`).

"""


def document(result: dict[str, Any]) -> str:
    """Return docs/soak.md."""
    about = f"{result['date']}, commit {result['commit']}, {result['machine']}"
    rows = [
        ("length", f"{result['minutes']} minutes, seed {result['seed']}"),
        ("accepted jobs", f"{result['jobs']:,} ({_list(result['ended'])})"),
        ("pictures stored", f"{result['pictures']:,}"),
        ("faults", f"{sum(result['strikes'].values())} ({_list(result['strikes'])})"),
        ("clients served", _list(result["clients"])),
        ("retried requests", f"{result['retries']:,}"),
        ("longest wait until a request was accepted", f"{result['longest_s']:.1f} s"),
        ("problems", str(len(result["problems"]))),
    ]
    text = HEAD + f"## Result\n\n{about}.\n\n| | |\n| --- | --- |\n"
    text += "".join(f"| {name} | {value} |\n" for name, value in rows)
    text += "\n| series, last half | median | slope, % an hour | 95 % interval | |\n| --- | --- | --- | --- | --- |\n"
    for what, trend in result["trends"].items():
        shown = f"{trend['median']:,.0f}" if what.endswith("keys") else f"{trend['median'] / 2**20:,.1f} MiB"
        interval = f"{100 * trend['low']:+.1f} to {100 * trend['high']:+.1f}"
        flat = "flat" if trend["flat"] else "**grows**"
        text += f"| {what} | {shown} | {100 * trend['slope']:+.1f} | {interval} | {flat} |\n"
    return text


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


def keep(result: dict[str, Any]) -> None:
    """Save a result and write the document."""
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    DOCUMENT.write_text(document(result))


if __name__ == "__main__":
    keep(json.loads(RESULTS.read_text()))
