"""`make bench` and `make bench-quick`: `python -m benchmarks.run [--quick]` runs all sections and writes the document.

Each section runs in its own process and saves its data when it ends; a failing section does not stop the others.
`--only load,growth` measures only those.
"""

import argparse
import subprocess
import sys
import time

from benchmarks.results import ROOT, say

# The sections that need the least disturbed machine come first.
SECTIONS = (
    "roofline", "servers", "sampling", "service", "models", "workers", "waits", "selected", "load", "training",
    "growth", "scaling", "startup",
)  # fmt: skip
HANGS_S = 3 * 3600  # a section ends itself long before, with fewer rounds on a slow machine


def run(module: str, quick: bool) -> str | None:
    """Run a module of this package. Return what went wrong, or None."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *(["--quick"] if quick else [])]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=HANGS_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"took longer than {HANGS_S} s"
    return f"ended with exit status {code}" if code else None


def named(text: str) -> list[str]:
    """Parse `--only`: return its sections in the order of measurement. ArgumentTypeError for an unknown one."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"unknown section {', '.join(unknown)}; use {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two to three minutes; into runs/bench-quick")
    parser.add_argument(
        "--only", type=named, default=SECTIONS, metavar="SECTION,...", help=f"some of {', '.join(SECTIONS)}"
    )
    asked, began, failed = parser.parse_args(), time.monotonic(), []
    for number, name in enumerate(asked.only, 1):
        say(f"[{time.monotonic() - began:4.0f} s] {number} of {len(asked.only)}: {name}")
        if problem := run(f"sections.{name}", asked.quick):
            failed.append(f"{name} {problem}")
            say(f"  {failed[-1]}")
    if problem := run("report", asked.quick):
        failed.append(f"report {problem}")
    say(f"[{time.monotonic() - began:4.0f} s] {'; '.join(failed) or 'all measured'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
