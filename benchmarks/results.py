"""The file of results, and the facts about machine and commit that it records. Knows no section.

A module in `sections/` has `measure(quick)`, which returns its data, and `report(data)`, which writes it up. `main`
runs one of them from the command line and saves the data in `benchmarks/results.json`.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
QUICK_RESULTS = ROOT / "runs" / "bench-quick" / "results.json"
STORAGE = ROOT / "models"
RATE_S = 1.0
LIBRARIES = (
    "torch", "openvino", "torchvision", "diffusers", "accelerate", "redis", "rq", "fastapi", "uvicorn", "litserve",
    "numpy",
)  # fmt: skip

Data = dict[str, Any]


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> Data:
    """Return what the figures depend on besides the code."""
    import torch

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = ("avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "features": [name for name in names if f" {name}" in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := installed(name))},
    }


def machine_rate() -> float:
    """Return how many matrix products of a fixed size the machine computes in a second now."""
    import torch

    a, begun, products = torch.ones(512, 512), time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < RATE_S:
        a @ a
        products += 1
    return products / taken


def installed(name: str) -> str | None:
    """Return a package's version, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Return the measured commit, with a + if files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    code = ("shared", "service", "trainer", "iclevr", "models")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


@dataclass(frozen=True)
class Results:
    """The file of results: the data of each section."""

    path: Path

    def read(self) -> dict[str, Data]:
        found: dict[str, Data] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return found

    def keep(self, name: str, section: Data) -> None:
        """Save a section's data, replacing what was measured before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self.read(), name: section}, indent=1) + "\n")
        os.replace(temporary, self.path)


def now() -> str:
    """Return the time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def results(quick: bool) -> Results:
    """Return the file of a full or of a quick run."""
    return Results(QUICK_RESULTS if quick else RESULTS)


def main(name: str, description: str | None, measure: Callable[[bool], Data]) -> None:
    """Run a section from the command line: measure, save the data, print the figures."""
    import psutil  # here, because `faults` imports this module, and needs no more than a worker has

    parser = argparse.ArgumentParser(f"python -m benchmarks.sections.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes; saves to runs/bench-quick")
    quick = parser.parse_args().quick
    others, before, start = psutil.cpu_percent(1.0), machine_rate(), time.monotonic()
    data = measure(quick)
    about = {"seconds": round(time.monotonic() - start, 1), "measured_at": now(), "commit": commit()}
    about |= {"machine": machine(), "others_percent": others, "machine_rate": (before, machine_rate())}
    results(quick).keep(name, {**about, **data})
    for key, value in data["figures"].items():
        say(f"  {key}: {value['median']:.4g}, from {value['low']:.4g} to {value['high']:.4g} ({value['n']} times)")
