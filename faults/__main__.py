"""`python -m faults [NAME ...]` injects each fault into a fresh service and writes docs/reliability.md."""

import argparse
import sys

import httpx

from faults import report
from faults.cases import CASES
from faults.cases.case import Case
from faults.harness import running
from faults.trial import Traffic, Trial

LOGS = report.ROOT / "runs" / "faults"


class CheckFailed(RuntimeError):
    """Something that must hold did not. The message lists what."""


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def try_out(case: Case) -> dict[str, float]:
    """Start a service, inject the fault, check the outcome and return the figures. CheckFailed, NotInTime."""
    service = case.workers, case.worker_command, case.environment, case.clocks, case.beside
    with running(*service, LOGS / case.name) as stack:
        trial = Trial(stack, case.headers, say, case.bodies)
        say("ready; running the jobs without a fault first")
        trial.run_undisturbed()
        with Traffic(trial) as traffic:
            case.run(trial)
        problems = trial.check()
        if trial.recovery_s > report.WITHIN_S:
            problems.append(f"recovery took {trial.recovery_s:.1f} s; {report.WITHIN_S:.0f} s are allowed")
        if problems:
            raise CheckFailed("\n".join(problems))
    return {"recovery_s": round(trial.recovery_s, 1), "longest_wait_s": round(traffic.longest_s, 1)}


def main() -> int:
    parser = argparse.ArgumentParser("python -m faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(CASES)}; all by default")
    names = parser.parse_args().names or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"unknown fault {unknown[0]!r}; use {', '.join(CASES)}")
    failed = []
    for name in names:
        print(f"{name}: {CASES[name].description}", flush=True)
        try:
            result = try_out(CASES[name])
        except (RuntimeError, httpx.HTTPError) as error:
            print(f"{name} failed; logs are in {LOGS / name}:\n{error}", file=sys.stderr, flush=True)
            report.forget(name)
            failed.append(name)
        else:
            report.keep(name, result)
            say(f"passed: {result}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
