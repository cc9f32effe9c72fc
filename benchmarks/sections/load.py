"""Batching policies under load: `python -m benchmarks.sections.load`.

Requests of mixed sizes, steps and guidance arrive at random (Poisson) at fractions of the capacity. Continuous
batching, request-level batching and one at a time serve the same requests on the real network. Longer runs are
simulated on a virtual clock, by the step costs measured here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks import subject
from benchmarks.batching import (
    POLICIES,
    Arrival,
    RealClock,
    Served,
    StepCost,
    continuous,
    mean_network_rows,
    poisson,
    serve,
    simulate,
    within,
)
from benchmarks.document import Piece, Plot, Table, number
from benchmarks.results import Data, main, say
from benchmarks.subject import AT_ONCE, FEW_ROWS, LATE
from benchmarks.timing import Deadline, figure, in_turn, paired, percentile, pooled_p95
from shared.diffusion.denoise import Stepper
from shared.options import SamplingOptions

AT = 0.6  # the load at which p95 is compared, over several rounds
SPANS_S = {AT: 12.0, 0.3: 12.0, 0.9: 9.0, 1.2: 8.0}  # load -> how long requests arrive
CONTINUOUS, REQUEST_LEVEL, ONE = POLICIES
COMPARED = CONTINUOUS, REQUEST_LEVEL
SIMULATED_REQUESTS = 4000
LIMIT_S = 170.0  # of the section
BACKLOG_S = 45.0  # of that, for serving backlogs
FEWEST = 4  # requests of a backlog on a machine that serves no more in half of that time


def step_costs(stepper: Stepper, labels: torch.Tensor, rows: list[int], rounds: int) -> dict[int, float]:
    """Return the median seconds of a step by its network rows."""
    options = SamplingOptions(steps=1000, guidance=1.0)
    batches = {n: [stepper.new_row(labels, options, seed) for seed in range(n)] for n in rows}
    works = {str(n): (lambda batch=batch: stepper.step(batch)) for n, batch in batches.items()}
    return {int(n): figure(taken)["median"] for n, taken in in_turn(works, rounds).items()}


def summary(latencies: list[float]) -> Data:
    """Summarise latencies, in s."""
    quantiles = {f"p{q}": percentile(latencies, q / 100) for q in (50, 95, 99)}
    return {"mean": sum(latencies) / len(latencies), **quantiles, "requests": len(latencies)}


def capacity(cost: StepCost) -> float:
    """Return the requests/s of continuous batching on a backlog, simulated with measured step costs."""
    backlog = poisson(1e9, SIMULATED_REQUESTS, seed=1)
    return len(backlog) / simulate(continuous, backlog, cost, AT_ONCE, FEW_ROWS, LATE).ended_at


def alone(cost: StepCost) -> Data:
    """Summarise the latencies of requests on an idle device: the lower bound of every policy."""
    apart = poisson(1e-6, SIMULATED_REQUESTS, seed=7)
    return summary(simulate(continuous, apart, cost, AT_ONCE).latencies)


class Bench:
    """Runs the three policies on the real network and keeps the outcomes by load and policy."""

    def __init__(self, stepper: Stepper, labels: torch.Tensor, deadline: Deadline) -> None:
        self.stepper, self.labels, self.deadline = stepper, labels, deadline
        self.served: dict[float, dict[str, list[Served]]] = {}

    def serve(self, name: str, arrivals: Sequence[Arrival]) -> Served:
        return serve(
            POLICIES[name],
            arrivals,
            self.stepper,
            RealClock(),
            max_pictures=AT_ONCE,
            few=FEW_ROWS,
            late=LATE,
            labels=self.labels,
        )

    def saturated(self, requests: int, rounds: int) -> dict[str, list[float]]:
        """Return the pictures/s of a backlog with continuous batching and one at a time, in turn."""
        found: dict[str, list[float]] = {CONTINUOUS: [], ONE: []}
        for turn in Deadline(BACKLOG_S).rounds(rounds):
            for name, rates in found.items():
                served = self.serve(name, poisson(1e9, requests, seed=100 + turn))
                rates.append(served.pictures / served.ended_at)
        say(f"  {len(found[ONE])} backlogs, {self.deadline.spent:.0f} s")
        return found

    def at(self, load: float, capacity: float, span_s: float, names: Iterable[str] = POLICIES) -> None:
        """Run one more round at a load: all policies serve the same requests of about `span_s`."""
        by = self.served.setdefault(load, {name: [] for name in POLICIES})
        rate, seed = load * capacity, len(by[CONTINUOUS])
        for name in names:
            by[name].append(self.serve(name, within(span_s, rate, seed)))
        say(f"  load {load}, round {seed + 1}, {self.deadline.spent:.0f} s")


def measure(quick: bool) -> Data:
    spans_s, more, backlog, turns = ({AT: 3.0}, 0, 4, 1) if quick else (SPANS_S, 5, 16, 3)
    deadline, ours = Deadline(LIMIT_S), subject.denoiser()
    stepper = ours.stepper()
    labels = subject.multi_hot([["red cube"]], ours.vocabulary)[0]
    measured = step_costs(stepper, labels, [1, 2, 4, 8, 16, 24, 32], 3 if quick else 11)
    cost = StepCost(measured)
    rate = capacity(cost)
    say(f"  capacity {rate:.2f} requests/s, of {mean_network_rows():.0f} network rows on average")
    bench = Bench(stepper, labels, deadline)
    saturated = bench.saturated(min(backlog, max(FEWEST, round(rate * BACKLOG_S / 2))), turns)
    for load, span_s in spans_s.items():
        if load == AT or deadline.allows(len(POLICIES) * span_s):
            bench.at(load, rate, span_s)
    for _ in deadline.rounds(more, at_least=0, expected_s=len(COMPARED) * spans_s[AT]):
        bench.at(AT, rate, spans_s[AT], COMPARED)
    simulated = {
        str(load): {
            name: summary(simulate(policy, arriving, cost, AT_ONCE, FEW_ROWS, LATE).latencies)
            for name, policy in POLICIES.items()
        }
        for load in sorted(SPANS_S)
        for arriving in [poisson(load * rate, SIMULATED_REQUESTS, 7)]
    }
    together = simulate(continuous, poisson(AT * rate, SIMULATED_REQUESTS, 7), cost, AT_ONCE)
    by_round = {name: [one.latencies for one in runs] for name, runs in bench.served[AT].items()}
    at, latencies = simulated[str(AT)], {str(load): pooled(bench.served[load]) for load in sorted(bench.served)}
    return {
        "figures": {
            "batching.p95_ratio_at_0_6": pooled_p95(by_round[CONTINUOUS], by_round[REQUEST_LEVEL]),
            "batching.p95_ratio_at_0_6_simulated": figure([at[CONTINUOUS]["p95"] / at[REQUEST_LEVEL]["p95"]]),
            "batching.throughput_vs_one_at_a_time": paired(saturated[CONTINUOUS], saturated[ONE]),
        },
        "requests_per_s": rate,
        "step_s": measured,
        "max_pictures": AT_ONCE,
        "few": FEW_ROWS,
        "late": LATE,
        "saturated": saturated,
        "latencies": latencies,
        "pictures_per_s": {str(load): rates(by) for load, by in bench.served.items()},
        "simulated": simulated,
        "together": summary(together.latencies),
        "alone": alone(cost),
        "spans_s": {str(load): span_s for load, span_s in spans_s.items()},
    }


def pooled(by: dict[str, list[Served]]) -> Data:
    """Summarise each policy's latencies over all rounds of a load."""
    return {name: summary([one for served in runs for one in served.latencies]) for name, runs in by.items()}


def rates(by: dict[str, list[Served]]) -> Data:
    """Return each policy's pictures/s over all rounds of a load."""
    return {name: sum(one.pictures for one in runs) / sum(one.ended_at for one in runs) for name, runs in by.items()}


def out_of_reach(data: Data) -> str:
    """Say what this device's step costs allow at best, with any batching."""
    rows_per_s = {int(rows): int(rows) / seconds for rows, seconds in data["step_s"].items()}
    best, few = max(rows_per_s.values()), (rows_per_s[1], rows_per_s[2])
    floor, theirs = data["alone"]["p95"], data["simulated"][str(AT)][REQUEST_LEVEL]["p95"]
    return (
        f"Batching gains at most {number(best / few[0])} times for unguided pictures here, {number(best / few[1])} for "
        f"guided ones, by rows/s in calls of one row ({number(few[0])}), two ({number(few[1])}) and the best size "
        f"({number(best)}). No p95 can be below an idle device's {number(floor)} s, {number(floor / theirs)} of "
        "request-level batching's."
    )


def who_waits(data: Data) -> str:
    """Say what it gains that large requests wait for small ones."""
    now, together = data["simulated"][str(AT)][CONTINUOUS], data["together"]
    return (
        f"Large requests give way to small ones once a step has {data['few']} network rows: simulated at {AT}, mean, "
        f"p95 and p99 are {number(now['mean'])}, {number(now['p95'])} and {number(now['p99'])} s, otherwise "
        f"{number(together['mean'])}, {number(together['p95'])} and {number(together['p99'])} s."
    )


def report(data: Data) -> list[Piece]:
    table = Table(["load", "policy", "mean s", "p95", "requests", "simulated mean", "p95"])
    for load, by in data["latencies"].items():
        if float(load) > 1:  # latencies grow for as long as requests arrive
            continue
        for name, found in by.items():
            simulated = data["simulated"][load][name]
            cells = (number(found[key]) for key in ("mean", "p95"))
            table.add(load, name, *cells, found["requests"], number(simulated["mean"]), number(simulated["p95"]))
    spans = " to ".join(f"{end(data['spans_s'].values()):.0f}" for end in (min, max))
    left_out = [load for load in data["spans_s"] if load not in data["latencies"]]
    note = f" There was no time for loads of {', '.join(left_out)}." if left_out else ""
    saturated = {name: number(figure(found)["median"]) for name, found in data["saturated"].items()}
    return [
        "*Continuous* batching, the service's, lets pictures join and leave at any step. *Request-level* batching "
        "takes whole requests and answers when the batch ends. *One at a time* samples one picture after the other; "
        f"above a load of about 0.5 its latency never settles. A load of 1 is {data['requests_per_s']:.2f} requests/s, "
        "continuous batching's simulated rate on a backlog. A request has 1 to 8 pictures, 4 to 16 steps and guidance "
        f"1 or 3, {mean_network_rows():.0f} network rows on average. {data['max_pictures']} pictures are in progress, "
        f"in continuous batching up to {data['late']} more. A run takes the requests of {spans} s.{note}",
        table,
        f"Simulated: the same scheduler, {SIMULATED_REQUESTS} requests, a virtual clock ([checked](#capacity)). On a "
        f"backlog, continuous batching samples {saturated[CONTINUOUS]} pictures/s, one at a time {saturated[ONE]}.",
        who_waits(data),
        out_of_reach(data),
        Plot("load", "latency by load; dots measured, lines simulated", lambda axes: draw_latency(axes, data), 2),
        Plot("load-throughput", "throughput by load, measured", lambda axes: draw_throughput(axes, data)),
    ]


def draw_latency(axes: Sequence[Any], data: Data) -> None:
    loads, below = list(data["latencies"]), [load for load in data["simulated"] if float(load) < 1]
    for ax, key in zip(axes, ("p50", "p95"), strict=True):
        for i, name in enumerate(POLICIES):
            found = [data["latencies"][load][name][key] for load in loads]
            ax.plot([float(load) for load in loads], found, f"oC{i}", linestyle="none", label=name)
            ax.plot([float(n) for n in below], [data["simulated"][n][name][key] for n in below], f"C{i}--")
        ax.set(xlabel="load, fraction of capacity", ylabel=f"{key} latency, s", yscale="log")
    axes[0].legend(fontsize=7)


def draw_throughput(axes: Sequence[Any], data: Data) -> None:
    loads = sorted(data["pictures_per_s"], key=float)
    for i, name in enumerate(POLICIES):
        found = [data["pictures_per_s"][load][name] for load in loads]
        axes[0].plot([float(load) for load in loads], found, f"oC{i}-", label=name)
    axes[0].set(xlabel="load, fraction of capacity", ylabel="pictures/s")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=7)


if __name__ == "__main__":
    main("load", __doc__, measure)
