"""`python -m soak` runs the soak, prints a line a minute, and writes docs/reliability.md if nothing is wrong."""

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from benchmarks.results import commit
from faults.harness import NotInTime, until
from faults.report import ROOT, keep_soak, machine
from service.files import PictureFiles
from soak import outcome
from soak.load import Load
from soak.memory import Sampler
from soak.receiver import Receiver
from soak.stack import JOB_TIMEOUT_S, KEEP_S, SoakStack, running
from soak.strikes import Striker, insist, plan, unplanned
from soak.trend import JUDGED_MINUTES

FOLDER = ROOT / "runs" / "soak"
UNBROKEN = ("redis, keys", "spare api, memory", "worker 1, memory")  # series that no fault ends


def say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)


def report_each_minute(load: Load, sampler: Sampler, ended: threading.Event) -> None:
    begun = time.monotonic()
    while not ended.wait(60):
        minutes = (time.monotonic() - begun) / 60
        shown = [
            f"{what} {value:,.0f}" if what.endswith("keys") else f"{what} {value / 2**20:,.1f} MiB"
            for what, value in sampler.latest().items()
        ]
        problems = load.ledger.problems
        say(f"{minutes:.0f} min: {len(load.ledger.jobs)} jobs, {len(problems)} problems; {'; '.join(shown)}")
        for problem in problems[-3:]:
            say(f"  {problem}")


def soak(stack: SoakStack, seed: int, minutes: float) -> dict[str, Any]:
    """Run load and faults, then check everything; return the figures."""
    strikes = plan(seed, minutes * 60)
    for strike in strikes:
        say(f"planned at {strike.at_s:.0f} s: {strike.kind} {strike.target}")
    receiver = Receiver()
    load, striker = Load(stack, receiver, seed), Striker(stack, strikes, say)
    load.learn()
    say("ready; the faults begin")
    sampler, ended = Sampler(stack, lambda: striker.active), threading.Event()
    sampler.start()
    striker.start()
    threading.Thread(target=report_each_minute, args=(load, sampler, ended), daemon=True).start()
    load.run(minutes * 60)
    striker.join()
    sampler.ended.set()
    ended.set()
    (FOLDER / "series.json").write_text(json.dumps({f"{what} {pid}": v for (what, pid), v in sampler.series.items()}))
    is_long = minutes >= JUDGED_MINUTES
    trends = sampler.trends(minutes * 30, minutes * 60) if is_long else {}
    say("the load has ended; waiting until everything has expired")
    problems = [*load.ledger.problems, *_at_rest(stack)]
    problems += unplanned(strikes, striker.done, [name for name, _ in stack.deaths])
    problems += [f"{what} was not measured to the end" for what in UNBROKEN if is_long and what not in trends]
    found, counts = outcome.problems(
        load.ledger, load.expected, stack.redis.folder, PictureFiles(stack.store.settings.pictures)
    )
    problems += found + [f"{what} grows: {trend}" for what, trend in trends.items() if not trend.is_flat]
    return {
        "minutes": minutes,
        "seed": seed,
        "jobs": len(load.ledger.jobs),
        "pictures": counts.pop("pictures"),
        "ended": dict(sorted(counts.items())),
        "clients": dict(sorted(load.ledger.clients.items())),
        "strikes": dict(sorted(Counter(f"{one.kind} {one.target}" for one in striker.done).items())),
        "retries": load.ledger.retries,
        "longest_s": load.ledger.longest_s,
        "trends": {what: {**vars(trend), "flat": trend.is_flat} for what, trend in sorted(trends.items())},
        "problems": problems,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
    }


def _at_rest(stack: SoakStack) -> list[str]:
    """Wait until all jobs have expired; return what is left of them, and what would stay for ever."""
    lifetime_s = 60 + JOB_TIMEOUT_S + KEEP_S
    try:
        until(lambda: not insist(lambda: outcome.left_over(stack.connection)), "all jobs to expire", lifetime_s)
    except NotInTime:
        return [f"{count} keys {kind} are left over" for kind, count in outcome.left_over(stack.connection).items()]
    return []


def main() -> int:
    parser = argparse.ArgumentParser("python -m soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="of load and faults; random by default"
    )
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    say(f"seed {arguments.seed}; logs are in {FOLDER}")
    with running(FOLDER) as stack:
        result = soak(stack, arguments.seed, arguments.minutes)
    (FOLDER / "result.json").write_text(json.dumps(result, indent=1))
    for problem in result["problems"]:
        print(problem, file=sys.stderr)
    if not result["problems"]:
        keep_soak(result)
    say(f"{len(result['problems'])} problems; {result['jobs']} jobs, {result['trends']}")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
