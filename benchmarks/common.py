"""What the benchmarks share: taking turns, medians and spreads, facts about the machine, and the file of results.

Knows no subject. A section's module has `measure(quick)`, which returns its data, and `report(data)`, which writes it
up; `main` keeps the data in `benchmarks/results.json` as soon as it is there.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
QUICK_RESULTS = ROOT / "runs" / "bench-quick" / "results.json"
STORAGE = ROOT / "models"
LIBRARIES = ("torch", "torchvision", "diffusers", "accelerate", "redis", "rq", "fastapi", "uvicorn", "numpy")

Data = dict[str, Any]


def figure(values: Iterable[float]) -> Data:
    """Median and spread (the highest minus the lowest) of repeated measurements."""
    found = list(values)
    low, high = min(found), max(found)
    return {"median": statistics.median(found), "spread": high - low, "low": low, "high": high, "n": len(found)}


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least the share `q` of all values does not exceed. ValueError if there are none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(0, -(-round(q * 1e6) * len(ordered) // 10**6) - 1)]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Deadline:
    """The time that a section may take, from now on."""

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self._now, self._start = limit_s, now, now()

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return self._now() - self._start

    def allows(self, expected_s: float) -> bool:
        return self.spent + expected_s <= self.limit_s

    def rounds(self, count: int, *, at_least: int = 1, expected_s: float = 0.0) -> Iterator[int]:
        """Numbers of rounds, up to `count`; it stops where one as long as the longest so far would end too late.

        `expected_s`: how long the first one takes.
        """
        longest = expected_s
        for number in range(count):
            if number >= at_least and not self.allows(longest):
                return
            begun = self.spent
            yield number
            longest = max(longest, self.spent - begun)


def in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, *, warm: bool = True, deadline: Deadline | None = None
) -> dict[str, list[float]]:
    """Seconds of each work in each round; they take turns, so that a slow minute slows all. A round more warms up.

    With a `deadline`, there are fewer rounds where they would take longer, one at least.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in deadline.rounds(rounds + warm, at_least=1 + warm) if deadline else range(rounds + warm):
        for name, work in works.items():
            taken = seconds(work)
            if number >= warm:
                times[name].append(taken)
    return times


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def say(line: str) -> None:
    print(line, flush=True)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> Data:
    """What the figures depend on besides the code."""
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
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def commit() -> str:
    """The commit that is measured, with a + where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "shared", "service", "trainer", "models")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


@dataclass(frozen=True)
class Results:
    """The file of results: figures under their own names, then `about` and the data of each `section`."""

    path: Path

    def read(self) -> Data:
        return json.loads(self.path.read_text()) if self.path.exists() else {"about": {}, "sections": {}}

    def begin(self, quick: bool) -> Data:
        """The results to go on from: those of a run that was interrupted on this commit and machine, or none."""
        content, about = self.read(), {"commit": commit(), "quick": quick, "machine": machine()}
        before = content["about"]
        if before.get("finished_at") or any(before.get(key) != value for key, value in about.items()):
            content = {"about": {**about, "started_at": now()}, "sections": {}}
            self.write(content)
        return content

    def keep(self, name: str, section: Data) -> None:
        """Puts a section's data in the place of what was known of it."""
        content = self.read()
        content["sections"][name] = section
        content["about"].setdefault("machine", machine())
        content["about"].setdefault("commit", commit())
        self.write(content)

    def finish(self) -> None:
        content = self.read()
        content["about"]["finished_at"] = now()
        self.write(content)

    def write(self, content: Data) -> None:
        sections = content["sections"]
        figures = {key: value for name in sections for key, value in sections[name].get("figures", {}).items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        whole = {**dict(sorted(figures.items())), "about": content["about"], "sections": sections}
        temporary.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(temporary, self.path)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def results(quick: bool) -> Results:
    return Results(QUICK_RESULTS if quick else RESULTS)


def main(name: str, description: str | None, measure: Callable[[bool], Data]) -> None:
    """The command line of a section: measures, keeps the data, prints the section's figures."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, kept in runs/bench-quick")
    quick = parser.parse_args().quick
    start = time.monotonic()
    data = measure(quick)
    about = {"seconds": round(time.monotonic() - start, 1), "quick": quick, "measured_at": now(), "commit": commit()}
    results(quick).keep(name, {**about, **data})
    for key, value in data["figures"].items():
        say(f"  {key}: {value['median']:.4g}, from {value['low']:.4g} to {value['high']:.4g} ({value['n']} times)")
    sys.stdout.flush()
