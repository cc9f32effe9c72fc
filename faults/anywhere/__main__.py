"""`python -m faults.anywhere` fails every place that calls a boundary, and prints what was not confined."""

import argparse
import sys
import time

from faults import report
from faults.anywhere.load import WITHIN_S
from faults.anywhere.process import ForkServer
from faults.anywhere.sweep import STATE, State, fingerprint, sweep, table


def main() -> int:
    parser = argparse.ArgumentParser("python -m faults.anywhere", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long; the next run goes on")
    parser.add_argument("--stacks", type=int, default=2, help="services that run trials at the same time")
    parser.add_argument("--within", type=float, default=WITHIN_S, help="seconds in which all but the victim ends")
    parser.add_argument("--only", default="", help="the trials whose names contain this text, again if they have run")
    options = parser.parse_args()
    forks, state = ForkServer(), State(STATE / fingerprint())
    print(f"results are in {state.folder}", flush=True)
    trials = state.trials(forks, options.within)
    print(f"{len({trial.place for trial in trials})} places, {len(trials)} trials", flush=True)
    chosen = [trial for trial in trials if options.only in trial.key]
    if options.only:
        for trial in chosen:
            state.results.pop(trial.key, None)
    begun = time.monotonic()
    for number, (trial, result) in enumerate(
        sweep(forks, state, chosen, options.stacks, options.minutes, options.within), 1
    ):
        outcome = "not confined: " + "; ".join(result.problems) if result.problems else "confined"
        outcome = outcome if result.reached else f"not reached ({outcome})"
        died = f", {result.deaths} deaths" if result.deaths else ""
        error = f", error {result.error!r}" if result.error else ""
        print(
            f"{number} ({(time.monotonic() - begun) / number:.1f} s each) {trial.key}: {outcome}{died}{error}",
            flush=True,
        )
    rows = table(trials, state.results)
    swept = sum(state.results[trial.key].reached for trial in trials if trial.key in state.results)
    lines = [f"swept {swept} of {len(trials)}; {len(rows)} not confined", *(f"- {key}: {why}" for key, why, _ in rows)]
    (state.folder / "table.txt").write_text("\n".join(lines) + "\n")
    if not options.only:
        places = len({trial.place for trial in trials})
        about = {"places": places, "trials": len(trials), "swept": swept, "within_s": options.within}
        report.keep_sweep({**about, "rows": rows})
    print("\n".join(lines))
    return 0 if all(is_known for _, _, is_known in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
