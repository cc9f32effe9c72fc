"""Whose pictures step: `python -m benchmarks.step_order_choices` simulates the latencies of other choices.

The requests are those of `benchmarks/sections/load.py`, and steps cost what that section measured when it last ran.
Then the requests are those of `benchmarks/sections/servers.py`, and the latencies relative to LitServe's batching.
"""

import math
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from benchmarks.batching import (
    StepCost,
    continuous,
    eight_requests,
    least_p95,
    mean_network_rows,
    poisson,
    request_level,
    simulate,
)
from benchmarks.results import results
from benchmarks.sections import servers
from benchmarks.subject import AT_ONCE, FEW_ROWS, LATE
from benchmarks.timing import percentile, pooled_p95
from service.worker import step_order

LOADS, SEEDS, REQUESTS = (0.6, 0.9), (11, 12, 13, 14), 500
ROUNDS = {12: 60, 500: 4}  # requests of a round, as in the benchmark and in a long run -> rounds
Variant = dict[str, float]
OF_STEP_ORDER = ("DELAY_LIMIT", "AGING", "LATE_EACH_STEP")
SHIPPED: Variant = {"few": FEW_ROWS, "late": LATE, **{name: getattr(step_order, name) for name in OF_STEP_ORDER}}
VARIANTS: dict[str, Variant] = {
    "shipped": {},
    "as before: no late pictures, limit 0.5": {"late": 0, "DELAY_LIMIT": 0.5},
    "as before, and large jobs wait from 16 rows on": {"few": 16, "late": 0, "DELAY_LIMIT": 0.5},
    "no late pictures": {"late": 0},
    "48 late pictures": {"late": 48},
    "one late picture at each step": {"LATE_EACH_STEP": 1},
    "16 late pictures at each step": {"LATE_EACH_STEP": 16},
    "large jobs wait from 4 rows on": {"few": 4},
    "limit 0.5": {"DELAY_LIMIT": 0.5},
    "limit 1": {"DELAY_LIMIT": 1.0},
    "aging 0.1": {"AGING": 0.1},
    "aging 0.4": {"AGING": 0.4},
}


def ratios(cost: StepCost, load: float, variant: Variant) -> tuple[float, float, float]:
    """Return the mean, p95 and p99 of latencies relative to request-level batching's, the geometric mean over seeds."""
    chosen = SHIPPED | variant
    rate = load / (mean_network_rows() * cost(32) / 32)
    logs = [0.0, 0.0, 0.0]
    with patch.multiple(step_order, **{name: chosen[name] for name in OF_STEP_ORDER}):
        for seed in SEEDS:
            arrivals = poisson(rate, REQUESTS, seed)
            ours = simulate(continuous, arrivals, cost, AT_ONCE, int(chosen["few"]), int(chosen["late"])).latencies
            other = simulate(request_level, arrivals, cost, AT_ONCE).latencies
            pairs = [(sum(ours), sum(other))] + [(percentile(ours, q), percentile(other, q)) for q in (0.95, 0.99)]
            logs = [log + math.log(a / b) / len(SEEDS) for log, (a, b) in zip(logs, pairs, strict=True)]
    mean, p95, p99 = map(math.exp, logs)
    return mean, p95, p99


def beside_litserve(cost: StepCost, requests: int, rounds: int) -> tuple[float, float]:
    """Return the p95 of the shipped choice, and the smallest of all schedules, relative to LitServe's."""
    rate = servers.LOAD / (mean_network_rows(servers.STEPS) * cost(32) / 32)
    runs = [poisson(rate, requests, seed, servers.STEPS) for seed in range(rounds)]
    row_s = min(cost(rows) / rows for rows in cost.sizes)
    few, late = int(SHIPPED["few"]), int(SHIPPED["late"])
    theirs = [simulate(eight_requests, run, cost, AT_ONCE).latencies for run in runs]
    ours = [simulate(continuous, run, cost, AT_ONCE, few, late).latencies for run in runs]
    all_of_theirs = [latency for one in theirs for latency in one]
    return pooled_p95(ours, theirs)["median"], least_p95(runs, row_s) / percentile(all_of_theirs, 0.95)


def main() -> None:
    cost = StepCost(
        {int(rows): seconds for rows, seconds in results(quick=False).read()["sections"]["load"]["step_s"].items()}
    )
    table = Table("choice", *(f"load {load}: mean, p95, p99" for load in LOADS))
    for name, variant in VARIANTS.items():
        cells = [", ".join(f"{ratio:.2f}" for ratio in ratios(cost, load, variant)) for load in LOADS]
        table.add_row(name, *cells)
    Console().print(table)
    table = Table("requests of a round", "p95 of LitServe's: shipped", "the smallest of all schedules")
    for requests, rounds in ROUNDS.items():
        table.add_row(str(requests), *(f"{ratio:.2f}" for ratio in beside_litserve(cost, requests, rounds)))
    Console().print(table)


if __name__ == "__main__":
    main()
