"""All benchmarks one after the other: `python -m benchmarks.run [--quick]`, as `make bench` and `make bench-quick` do.

Each section is a process of its own, its results are kept as soon as it ends, and one that fails does not stop the
others. Started again after an interruption, it goes on with the sections that are missing; with `--only load,growth` it
measures those anew and leaves the others as they are. At the end the documents are written from the results.
"""

import argparse
import subprocess
import sys
import time

from benchmarks.results import ROOT, Data, results, say

# The least disturbed first, and what needs the service after what does not. With the longest each may take, in s: 25
# minutes in all. Sampling, load, training and growth do less where the machine is slow, so as to end before.
SECTIONS = {
    "roofline": 40,
    "sampling": 390,
    "service": 120,
    "load": 330,
    "training": 210,
    "growth": 350,
    "startup": 60,
}


def missing(content: Data) -> list[str]:
    """The sections that have not been measured, or failed, in order."""
    return [name for name in SECTIONS if "figures" not in content["sections"].get(name, {})]


def run_section(name: str, quick: bool) -> str | None:
    """Runs one section; returns what went wrong, or None."""
    command = [sys.executable, "-m", f"benchmarks.sections.{name}", *(["--quick"] if quick else [])]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=SECTIONS[name], check=False).returncode
    except subprocess.TimeoutExpired:
        return f"it took longer than {SECTIONS[name]} s"
    return f"it ended with exit status {code}" if code else None


def write_documents(quick: bool) -> int:
    """The exit status of `benchmarks.report`."""
    command = [sys.executable, "-m", "benchmarks.report", *(["--quick"] if quick else [])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def named(text: str) -> list[str]:
    """Sections as `--only` names them, in the order they are measured in. ArgumentTypeError for an unknown one."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two or three minutes, to runs/bench-quick")
    parser.add_argument("--only", type=named, metavar="SECTION,...", help=f"some of {', '.join(SECTIONS)}")
    asked = parser.parse_args()
    quick, kept, began = asked.quick, results(asked.quick), time.monotonic()
    names = asked.only or missing(kept.begin(quick))
    if not asked.only and len(names) < len(SECTIONS):
        say(f"going on where the last run stopped: {', '.join(names) or 'nothing'} left")
    failed = []
    for number, name in enumerate(names, 1):
        say(f"[{time.monotonic() - began:4.0f} s] {number} of {len(names)}: {name}")
        if problem := run_section(name, quick):
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
