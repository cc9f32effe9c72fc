"""Whose pictures step: `python -m benchmarks.choices.step_order` simulates the latencies of other choices.

The requests are those of `benchmarks/sections/load.py`, and steps cost what that section measured when it last ran.
"""

import math
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from benchmarks.batching import StepCost, continuous, mean_network_rows, poisson, request_level, simulate
from benchmarks.results import results
from benchmarks.timing import percentile
from service.worker import step_order

LOADS, SEEDS, REQUESTS = (0.6, 0.9), (11, 12, 13, 14), 500
AT_ONCE = 16  # pictures of a batch
Variant = dict[str, float]
OF_STEP_ORDER = ("DELAY_LIMIT", "AGING", "LATE_EACH_STEP")
SHIPPED: Variant = {"few": 8, "late": 16, **{name: getattr(step_order, name) for name in OF_STEP_ORDER}}
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


def main() -> None:
    cost = StepCost(
        {int(rows): seconds for rows, seconds in results(quick=False).read()["sections"]["load"]["step_s"].items()}
    )
    table = Table("choice", *(f"load {load}: mean, p95, p99" for load in LOADS))
    for name, variant in VARIANTS.items():
        cells = [", ".join(f"{ratio:.2f}" for ratio in ratios(cost, load, variant)) for load in LOADS]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
