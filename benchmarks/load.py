"""Batching under load: `python -m benchmarks.load`.

Requests arrive by chance (Poisson) at shares of the capacity, with mixed sizes, steps and guidance, and are served on
the real network by step-wise continuous batching, by request-level batching and one at a time. All three get the same
requests. Beside that, long schedules on a virtual clock, by the cost of a step that was measured here.
"""

import torch

from benchmarks import subject
from benchmarks.common import Data, figure, in_turn, main, percentile, say
from benchmarks.document import Plot, Table, number
from benchmarks.policies import (
    POLICIES,
    RealClock,
    Served,
    StepCost,
    continuous,
    mean_network_rows,
    one_at_a_time,
    poisson,
    serve,
    simulate,
)
from service.settings import Settings
from shared.denoise import Stepper
from shared.options import SamplingOptions

LOADS = (0.3, 0.6, 0.9, 1.2)
SIMULATED_REQUESTS = 4000


def step_costs(stepper: Stepper, labels: torch.Tensor, rows: list[int], rounds: int) -> dict[int, float]:
    """Median seconds of a step over its network rows."""
    options = SamplingOptions(steps=1000, guidance=1.0)
    batches = {n: [stepper.new_row(labels, options, seed) for seed in range(n)] for n in rows}
    works = {str(n): (lambda batch=batch: stepper.step(batch)) for n, batch in batches.items()}
    return {int(n): figure(taken)["median"] for n, taken in in_turn(works, rounds).items()}


def summary(latencies: list[float]) -> Data:
    """Latencies, in s."""
    quantiles = {f"p{q}": percentile(latencies, q / 100) for q in (50, 95, 99)}
    return {"mean": sum(latencies) / len(latencies), **quantiles, "requests": len(latencies)}


def throughput(served: Served) -> float:
    return served.pictures / served.ended_at


def capacity(cost: StepCost, max_pictures: int) -> float:
    """Requests/s that continuous batching serves when there are always some waiting, by measured step costs."""
    backlog = poisson(1e9, SIMULATED_REQUESTS, seed=1)
    return len(backlog) / simulate(continuous, backlog, cost, max_pictures).ended_at


def saturated(stepper: Stepper, labels: torch.Tensor, max_pictures: int, requests: int, rounds: int) -> Data:
    """Pictures/s of a backlog, by continuous batching and one at a time, in turn on the real network."""
    found: dict[str, list[float]] = {"continuous": [], "one at a time": []}
    for number_ in range(rounds):
        backlog = poisson(1e9, requests, seed=100 + number_)
        for name, policy in (("continuous", continuous), ("one at a time", one_at_a_time)):
            served = serve(policy, backlog, stepper, RealClock(), max_pictures=max_pictures, labels=labels)
            found[name].append(throughput(served))
    return found


def measure(quick: bool) -> Data:
    span_s, repeats = (4.0, {0.6: 1}) if quick else (15.0, {0.3: 1, 0.6: 3, 0.9: 1, 1.2: 1})
    settings, ours = Settings(), subject.denoiser()
    most, rows = subject.batch_limit(ours, settings)
    stepper = ours.stepper(max_rows=rows)
    labels = subject.multi_hot([["red cube"]], ours.vocabulary)[0]
    measured = step_costs(stepper, labels, [1, 2, 4, 8, 16, 24, 32], 3 if quick else 9)
    cost = StepCost(measured)
    rate = capacity(cost, most)
    say(f"  capacity {rate:.2f} requests/s; one of {mean_network_rows():.0f} network rows on average")
    found = saturated(stepper, labels, most, 4 if quick else 20, 1 if quick else 2)
    runs: dict[str, dict[str, list[list[float]]]] = {}
    rates: dict[str, dict[str, float]] = {}
    for load, times in repeats.items():
        for name, policy in POLICIES.items():
            served = []
            for seed in range(times):
                arrivals = poisson(load * rate, max(3, round(load * rate * span_s)), seed)
                served.append(serve(policy, arrivals, stepper, RealClock(), max_pictures=most, labels=labels))
            runs.setdefault(str(load), {})[name] = [one.latencies for one in served]
            total = sum(one.pictures for one in served) / sum(one.ended_at for one in served)
            rates.setdefault(str(load), {})[name] = total
        say(f"  load {load}: done")
    simulated = {
        str(load): {
            name: summary(simulate(policy, poisson(load * rate, SIMULATED_REQUESTS, 7), cost, most).latencies)
            for name, policy in POLICIES.items()
        }
        for load in LOADS
    }
    by_chance = runs["0.6"]
    pairs = zip(by_chance["step-wise continuous"], by_chance["request-level"], strict=True)
    ratio = figure(percentile(ours_, 0.95) / percentile(theirs, 0.95) for ours_, theirs in pairs)
    at = simulated["0.6"]
    return {
        "figures": {
            "batching.p95_ratio_at_0_6": ratio,
            "batching.p95_ratio_at_0_6_simulated": figure(
                [at["step-wise continuous"]["p95"] / at["request-level"]["p95"]]
            ),
            "batching.throughput_vs_one_at_a_time": figure(
                a / b for a, b in zip(found["continuous"], found["one at a time"], strict=True)
            ),
        },
        "requests_per_s": rate,
        "step_s": measured,
        "max_pictures": most,
        "saturated": found,
        "latencies": {
            load: {name: summary([one for each in lists for one in each]) for name, lists in by.items()}
            for load, by in runs.items()
        },
        "pictures_per_s": rates,
        "simulated": simulated,
        "span_s": span_s,
    }


def report(data: Data) -> list[str | Table | Plot]:
    names = list(POLICIES)
    table = Table(["load", "policy", "mean s", "p50", "p95", "p99", "requests", "pictures/s", "simulated mean", "p95"])
    for load, by in data["latencies"].items():
        for name in names:
            found, simulated = by[name], data["simulated"][load][name]
            cells = (number(found[key]) for key in ("mean", "p50", "p95", "p99"))
            rest = number(data["pictures_per_s"][load][name]), number(simulated["mean"]), number(simulated["p95"])
            table.add(load, name, *cells, found["requests"], *rest)
    overloaded = "A load over 1, and for the slower policies one below it, has no steady latency: it grows as long as "

    def draw(axes: object) -> None:
        for ax, key in zip(axes, ("p50", "p95"), strict=True):
            for i, name in enumerate(names):
                loads = list(data["latencies"])
                found = [data["latencies"][load][name][key] for load in loads]
                ax.plot([float(load) for load in loads], found, f"oC{i}", linestyle="none", label=name)
                below = [load for load in data["simulated"] if float(load) < 1]
                ax.plot([float(n) for n in below], [data["simulated"][n][name][key] for n in below], f"C{i}--")
            ax.set(xlabel="load, of the capacity", ylabel=f"{key} latency, s", yscale="log")
        axes[0].legend(fontsize=7)

    return [
        f"Capacity is what continuous batching serves of a backlog: {data['requests_per_s']:.2f} requests/s of "
        f"{mean_network_rows():.0f} network rows on average (1 to 8 pictures, 8 to 24 steps, guidance 1 or 3, at most "
        f"{data['max_pictures']} pictures in work). Request-level batching takes whole requests, mixed options and "
        "all, and answers when its batch is through. One at a time is one picture after the other. Each run takes the "
        f"requests of {data['span_s']:.0f} s; at 0.6 there are several, of other requests. {overloaded}they come.",
        table,
        f"Simulated: {SIMULATED_REQUESTS} requests by the same code on a virtual clock, a step costing what was "
        "measured for its rows. It is the model of docs/scaling.md, so that these columns are also its check.",
        Plot("load", "latency over load; dots measured, lines simulated", draw, panels=2),
    ]


if __name__ == "__main__":
    main("load", __doc__, measure)
