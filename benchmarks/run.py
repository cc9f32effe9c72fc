"""All benchmarks one after the other: `python -m benchmarks.run [--quick]`, as `make bench` and `make bench-quick` do.

Each section is a process of its own, and one that fails does not stop the others. Started again after an interruption,
it goes on with the sections that are missing. At the end the documents are written from the results.
"""

import argparse
import subprocess
import sys
import time

from benchmarks.common import ROOT, Data, results, say

# The least disturbed first, and what needs the service after what does not. With the longest each may take, in s.
SECTIONS = {
    "roofline": 300,
    "sampling": 600,
    "service": 400,
    "load": 600,
    "training": 400,
    "growth": 500,
    "startup": 300,
}


def missing(content: Data) -> list[str]:
    """The sections that have not been measured, or failed, in order."""
    return [name for name in SECTIONS if "figures" not in content["sections"].get(name, {})]


def run_section(name: str, quick: bool) -> str | None:
    """Runs one section; returns what went wrong, or None."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=SECTIONS[name], check=False).returncode
    except subprocess.TimeoutExpired:
        return f"it took longer than {SECTIONS[name]} s"
    return f"it ended with exit status {code}" if code else None


def write_documents(quick: bool) -> int:
    """The exit status of `benchmarks.report`."""
    command = [sys.executable, "-m", "benchmarks.report", *(["--quick"] if quick else [])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two minutes, written to runs/bench-quick")
    quick = parser.parse_args().quick
    kept, began = results(quick), time.monotonic()
    names = missing(kept.begin(quick))
    if len(names) < len(SECTIONS):
        say(f"going on where the last run stopped: {', '.join(names) or 'nothing'} left")
    failed = []
    for number, name in enumerate(names, 1):
        say(f"[{time.monotonic() - began:4.0f} s] {number} of {len(names)}: {name}")
        if problem := run_section(name, quick):
            failed.append(name)
            kept.keep(name, {"failed": problem})
            say(f"  {name} failed: {problem}")
    if not failed:
        kept.finish()
    code = write_documents(quick)
    outcome = f"failed: {', '.join(failed)}" if failed else "all sections measured"
    say(f"[{time.monotonic() - began:4.0f} s] {outcome}")
    return 1 if failed or code else 0


if __name__ == "__main__":
    sys.exit(main())
