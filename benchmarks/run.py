"""`make bench` and `make bench-quick`: `python -m benchmarks.run [--quick]` runs all sections and writes the documents.

Each section runs in its own process and saves its data when it ends; a failing section does not stop the others. After
an interruption, the same command continues with the missing sections. `--only load,growth` measures only those again.
"""

import argparse
import subprocess
import sys
import time

from benchmarks.results import ROOT, Data, Results, results, say
from benchmarks.timing import machine_rate

# The sections that need the least disturbed machine come first.
SECTIONS = (
    "roofline", "before", "servers", "sampling", "service", "workers", "load", "training", "growth", "scaling",
    "startup",
)  # fmt: skip
HANGS_S = 3 * 3600  # a section ends itself long before, with fewer rounds on a slow machine


def missing(content: Data) -> list[str]:
    """Return the sections that were not measured or failed, in order."""
    return [name for name in SECTIONS if "figures" not in content["sections"].get(name, {})]


def run_section(name: str, quick: bool) -> str | None:
    """Run one section. Return what went wrong, or None."""
    command = [sys.executable, "-m", f"benchmarks.sections.{name}", *(["--quick"] if quick else [])]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=HANGS_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"it took longer than {HANGS_S} s"
    return f"it ended with exit status {code}" if code else None


def measure(name: str, kept: Results, quick: bool) -> str | None:
    """Run one section, and record the machine's speed before and after. Return what went wrong, or None."""
    before = machine_rate()
    if problem := run_section(name, quick):
        return problem
    kept.keep(name, {**kept.read()["sections"][name], "machine_rate": (before, machine_rate())})
    return None


def write_documents(quick: bool) -> int:
    """Run `benchmarks.report` and return its exit status."""
    command = [sys.executable, "-m", "benchmarks.report", *(["--quick"] if quick else [])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def named(text: str) -> list[str]:
    """Parse `--only`: return its sections in the order of measurement. ArgumentTypeError for an unknown one."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"unknown section {', '.join(unknown)}; use {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two to three minutes; into runs/bench-quick")
    parser.add_argument("--only", type=named, metavar="SECTION,...", help=f"some of {', '.join(SECTIONS)}")
    asked = parser.parse_args()
    quick, kept, began = asked.quick, results(asked.quick), time.monotonic()
    names = asked.only or missing(kept.begin(quick))
    if not asked.only and len(names) < len(SECTIONS):
        say(f"continuing the last run; still to measure: {', '.join(names) or 'nothing'}")
    failed = []
    for number, name in enumerate(names, 1):
        say(f"[{time.monotonic() - began:4.0f} s] {number} of {len(names)}: {name}")
        if problem := measure(name, kept, quick):
            failed.append(name)
            if "figures" not in kept.read()["sections"].get(name, {}):
                kept.keep(name, {"failed": problem})
            say(f"  {name} failed: {problem}")
    if not missing(kept.read()):
        kept.finish()
    code = write_documents(quick)
    outcome = f"failed: {', '.join(failed)}" if failed else "all sections measured"
    say(f"[{time.monotonic() - began:4.0f} s] {outcome}")
    return 1 if failed or code else 0


if __name__ == "__main__":
    sys.exit(main())
