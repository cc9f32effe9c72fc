"""`python -m benchmarks.report` writes docs/performance.md and docs/dev/goals.md from `results.json`. Measures nothing.

With --quick, writes those of the last quick run to runs/bench-quick, beside its results.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks import capacity_model
from benchmarks.document import Piece, Table, markdown, number
from benchmarks.results import ROOT, Data, results, say
from benchmarks.timing import change

TITLES = {
    "sampling": "Sampling a batch",
    "roofline": "Against the limit",
    "service": "The service over the bare loop",
    "models": "One call a picture",
    "workers": "Two workers beside one",
    "load": "Batching under load",
    "servers": "Beside other servers",
    "waits": "Known waits",
    "selected": "Until exact",
    "growth": "Growth",
    "scaling": "One Redis",
    "training": "Training",
    "startup": "Start-up",
}
FOR_CONTRIBUTORS = ("roofline", "load", "workers", "growth", "scaling")  # sections of the page of goals
OTHERS = 20.0  # percent of the machine's cores; more is said in the page
OVERHEAD = "service.single_overhead_ms"  # its goal depends on the loop's time
Goal = tuple[str, str, float | None, bool]
# figure, description, goal (None: it depends on the machine), and whether a good figure is above the goal
GOALS: list[Goal] = [
    ("sampling.speedup_vs_report", "sampling 32 pictures, speed-up over the report's sampler", 1000.0, True),
    ("sampling.speedup_vs_diffusers_fp32", "the same over diffusers in fp32, equal solver and steps", 3.0, True),
    ("sampling.speedup_vs_diffusers_bf16", "the same over diffusers in bf16", 1.3, True),
    ("limit.fraction", "a network call of 16 rows, fraction of the best kernel", 0.6, True),
    ("service.saturation_fraction", "the service at saturation, fraction of the bare loop's pictures/s", 0.88, True),
    ("service.steps_fraction", "the same with the model of several steps", 0.88, True),
    (OVERHEAD, "one picture from an idle service, ms more than the loop", None, False),
    ("service.api_cpu_ms_per_request", "CPU of the API, ms per request", 1.2, False),
    ("batching.p95_ratio_at_0_6", "p95 at 0.6 of capacity, relative to request-level batching, simulated", 0.5, False),
    ("servers.burst_vs_litserve_quiet", "a burst, pictures/s relative to LitServe with our engine", 1.0, True),
    ("training.speedup_vs_library", "training, speed-up over diffusers' loop, fp32", 2.0, True),
    ("service.saturation_fraction_several", "the service, 8 pictures a request, fraction of the bare loop", 0.95, True),
    ("service.one_step_fraction", "the same with the small one-step model", 0.8, True),
    ("service.cpu_ms_beside_loop", "CPU beside the loop's, ms per picture", 5.0, False),
    (
        "batching.throughput_vs_one_at_a_time",
        "pictures/s at saturation, relative to one at a time, simulated",
        3.0,
        True,
    ),
    ("servers.burst_vs_litserve_busy", "the burst beside two busy processes", 1.0, True),
    ("servers.burst_vs_litserve_defaults_quiet", "the burst relative to LitServe with diffusers' defaults", 3.0, True),
    ("servers.burst_vs_litserve_defaults_busy", "the same beside two busy processes", 3.0, True),
    ("servers.arriving_p95_vs_litserve_quiet", "mixed requests at random times, p95 relative to LitServe", 0.7, False),
    ("training.speedup_vs_report", "training, speed-up over the report's loop", 10.0, True),
    ("waits.error_arriving", "forecasts of mixed requests at random times, median error", 0.2, False),
]


def goals(content: Data, chosen: Sequence[Goal] = GOALS) -> Table:
    """Return the table of figures that have a goal."""
    table = Table(["what", "median", "95 % interval", "goal", "met"])
    figures = {key: found for section in content.values() for key, found in section["figures"].items()}
    for key, what, goal, above in chosen:
        if (found := figures.get(key)) is None:
            continue
        if key == OVERHEAD:
            goal = round(content["service"]["goal_ms"]["median"], 1)
        wanted, met = "", ""
        if goal is not None:
            wanted = f"{'at least' if above else 'at most'} {goal:g}"
            met = "yes" if (found["median"] >= goal) == above else "no"
        table.add(what, number(found["median"]), " to ".join(map(number, found.get("interval") or ())), wanted, met)
    return table


def machine_line(content: Data) -> str:
    """Say on which machine, of which commits and when the sections were measured."""
    last = latest(content)
    machine, commits = last["machine"], ", ".join(sorted({one["commit"] for one in content.values()}))
    return (
        f"{processor(machine)}, {machine['memory_gib']} GiB, GPU: {machine['gpu'] or 'none'}. Measured commit: "
        f"{commits}; last section at {last['measured_at']}."
    )


def latest(content: Data) -> Data:
    """Return the section that was measured last."""
    return max(content.values(), key=lambda section: str(section["measured_at"]))


def processor(machine: Data) -> str:
    features = f" ({', '.join(machine['features'])})" if machine["features"] else ""
    return f"{machine['cpu']}, {machine['cores']} cores{features}"


def measured_line(name: str, section: Data, machine: Data) -> str:
    """Say how a section was measured, at which commit, and what differed: from `machine`, the page's, or meanwhile."""
    line = f"`python -m benchmarks.sections.{name}`, {section['seconds']:.0f} s, commit {section['commit']}."
    if processor(section["machine"]) != processor(machine):
        line += f" On another machine: {processor(section['machine'])}."
    if section["others_percent"] > OTHERS:
        line += f" Other work took {section['others_percent']:.0f} % of the machine just before."
    if share := change(section["machine_rate"]):
        line += f" The machine's speed changed by {100 * share:.0f} % meanwhile."
    return line


def performance(content: Data) -> list[Piece]:
    """Return docs/performance.md."""
    pieces: list[Piece] = [
        "# Performance",
        "How fast sampling, serving and training are, beside other ways to do the same. To size a deployment, see "
        "[capacity](#capacity).",
        "Alternatives take turns on the same machine. Figures are medians over rounds, and ratios are computed round "
        "by round. An interval is that of a ratio's geometric mean (Student's t of the logarithms). A ratio of p95s "
        "is computed over all rounds together, so it may lie outside its interval. *The report* is a "
        "[student's report](results.md#terms) whose code is a baseline. `make bench` writes this page, `benchmarks/"
        "results.json` has all figures and versions, and [goals](dev/goals.md) says which goals are met.",
        machine_line(content),
    ]
    return [
        *pieces,
        *sections(content, [name for name in TITLES if name not in FOR_CONTRIBUTORS]),
        *capacity_model.capacity(content),
    ]


def sections(content: Data, names: Sequence[str]) -> list[Piece]:
    """Return the pieces of some sections. One that was not measured says so."""
    pieces: list[Piece] = []
    for name in names:
        pieces.append(f"## {TITLES[name]}")
        if (section := content.get(name)) is None:
            pieces.append("Not measured yet.")
            continue
        pieces.append(measured_line(name, section, latest(content)["machine"]))
        pieces += import_module(f"benchmarks.sections.{name}").report(section)
    return pieces


def goals_page(content: Data) -> list[Piece]:
    """Return docs/dev/goals.md."""
    return [
        "# Goals of performance",
        "What each figure should be, and what limits it, for those who change the code. The page "
        "[Performance](../performance.md) says how figures are measured; `python -m benchmarks.report` writes both.",
        goals(content),
        *sections(content, FOR_CONTRIBUTORS),
    ]


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="of the last quick run, into runs/bench-quick")
    quick = parser.parse_args().quick
    kept = results(quick)
    folder: Path = kept.path.parent if quick else ROOT / "docs"
    content = kept.read()
    if not content:
        say(f"{kept.path} has no results: run `make bench{'-quick' if quick else ''}` first")
        return 1
    goals_of = folder if quick else folder / "dev"
    (goals_of / "goals.md").write_text(markdown(goals_page(content)))
    (folder / "performance.md").write_text(markdown(performance(content)))
    say(f"written: {folder / 'performance.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
