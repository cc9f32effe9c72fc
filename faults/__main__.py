"""`python -m faults` does each fault to a service of its own and writes docs/reliability.md; with names, only those."""

import argparse
import sys
from typing import Any

from faults import report
from faults.cases import CASES, Case
from faults.harness import NotInTime, running
from faults.trial import Traffic, Trial

LOGS = report.ROOT / "runs" / "faults"


class Wrong(RuntimeError):
    """Something that must hold did not; the message lists it."""


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def try_out(case: Case) -> dict[str, Any]:
    """Starts a service, does the fault, and returns the figures. Wrong, NotInTime."""
    with running(case.workers, case.worker_command, case.environment, case.clocks, LOGS / case.name) as stack:
        trial = Trial(stack, case.headers, say)
        say("ready; first the same jobs without a fault")
        trial.run_undisturbed()
        with Traffic(trial) as traffic:
            case.run(trial)
        wrong = trial.examine()
        if trial.recovery_s > report.WITHIN_S:
            wrong.append(f"recovery took {trial.recovery_s:.1f} s; {report.WITHIN_S:.0f} s are allowed")
        if wrong:
            raise Wrong("\n".join(wrong))
    numbers = [number for number in trial.jobs.values() if number is not None]
    return {
        "recovery_s": round(trial.recovery_s, 1),
        "longest_wait_s": round(traffic.longest_s, 1),
        "jobs": len(trial.jobs),
        "pictures": sum(len(trial.undisturbed[number].pictures) for number in numbers),
        "figures": trial.figures,
    }


def main() -> int:
    parser = argparse.ArgumentParser("python -m faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(CASES)}; default: all")
    names = parser.parse_args().names or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"there is no fault {unknown[0]!r}; there are {', '.join(CASES)}")
    failed = []
    for name in names:
        print(f"{name}: {CASES[name].what}", flush=True)
        try:
            result = try_out(CASES[name])
        except (Wrong, NotInTime, RuntimeError) as error:
            print(f"{name} went wrong; logs are in {LOGS / name}:\n{error}", file=sys.stderr, flush=True)
            report.forget(name)
            failed.append(name)
        else:
            report.keep(name, result)
            say(f"all is well: {result}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
