"""Batching policies under load, simulated: `python -m benchmarks.sections.load`.

Measures what a step of the network costs by its rows. With these costs, requests of mixed sizes, steps and guidance
arrive at random (Poisson) at fractions of the capacity, and are served by continuous batching, by request-level
batching and one at a time.
"""

from benchmarks import subject
from benchmarks.batching import POLICIES, StepCost, continuous, mean_network_rows, poisson, simulate
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main
from benchmarks.subject import AT_ONCE, FEW_ROWS, LATE
from benchmarks.timing import figure, in_turn, percentile
from shared.options import SamplingOptions

ROWS = 1, 2, 4, 8, 16, 24, 32  # of the steps that are measured
AT = 0.6  # the load at which p95 is compared
LOADS = 0.3, AT, 0.9
REQUESTS = 4000
CONTINUOUS, REQUEST_LEVEL, ONE = POLICIES


def step_costs(rounds: int) -> dict[int, float]:
    """Return the median seconds of a step by its network rows."""
    denoiser = subject.in_steps()
    stepper, options = denoiser.stepper(), SamplingOptions(steps=1000, guidance=1.0)
    labels = subject.multi_hot([["red cube"]], denoiser.vocabulary)[0]
    batches = {n: [stepper.new_row(labels, options, seed) for seed in range(n)] for n in ROWS}
    works = {str(n): (lambda batch=batch: stepper.step(batch)) for n, batch in batches.items()}
    return {int(n): figure(taken)["median"] for n, taken in in_turn(works, rounds).items()}


def summary(latencies: list[float]) -> Data:
    """Summarise latencies, in s."""
    quantiles = {f"p{q}": percentile(latencies, q / 100) for q in (95, 99)}
    return {"mean": sum(latencies) / len(latencies), **quantiles}


def simulated(step_s: dict[int, float]) -> Data:
    """Return what the policies reach at these costs."""
    cost, backlog = StepCost(step_s), poisson(1e9, REQUESTS, seed=1)
    ended = {
        name: simulate(policy, backlog, cost, AT_ONCE, FEW_ROWS, LATE).ended_at for name, policy in POLICIES.items()
    }
    rate = REQUESTS / ended[CONTINUOUS]
    by_load = {
        str(load): {
            name: summary(simulate(policy, arriving, cost, AT_ONCE, FEW_ROWS, LATE).latencies)
            for name, policy in POLICIES.items()
        }
        for load in LOADS
        for arriving in [poisson(load * rate, REQUESTS, seed=7)]
    }
    together = simulate(continuous, poisson(AT * rate, REQUESTS, seed=7), cost, AT_ONCE)
    apart = simulate(continuous, poisson(1e-6, REQUESTS, seed=7), cost, AT_ONCE)
    at = by_load[str(AT)]
    return {
        "figures": {
            "batching.p95_ratio_at_0_6": figure([at[CONTINUOUS]["p95"] / at[REQUEST_LEVEL]["p95"]]),
            "batching.throughput_vs_one_at_a_time": figure([ended[ONE] / ended[CONTINUOUS]]),
        },
        "requests_per_s": rate,
        "step_s": step_s,
        "max_pictures": AT_ONCE,
        "few": FEW_ROWS,
        "late": LATE,
        "simulated": by_load,
        "together": summary(together.latencies),
        "alone": summary(apart.latencies),
    }


def measure(quick: bool) -> Data:
    return simulated(step_costs(3 if quick else 11))


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
        f"Large requests give way to small ones once a step has {data['few']} network rows: at {AT}, mean, p95 and p99 "
        f"are {number(now['mean'])}, {number(now['p95'])} and {number(now['p99'])} s, otherwise "
        f"{number(together['mean'])}, {number(together['p95'])} and {number(together['p99'])} s."
    )


def report(data: Data) -> list[Piece]:
    table = Table(["load", "policy", "mean s", "p95", "p99"])
    for load, by in data["simulated"].items():
        for name, found in by.items():
            table.add(load, name, *(number(found[key]) for key in ("mean", "p95", "p99")))
    return [
        "Simulated, with the step times measured on this machine; [servers](../performance.md#beside-other-servers) "
        "are measured over HTTP. *Continuous* batching, the service's, lets pictures join and leave at any step. "
        "*Request-level* batching takes whole requests and answers when the batch ends. *One at a time* samples one "
        "picture after the "
        f"other; above a load of about 0.5 its latency never settles. A load of 1 is {data['requests_per_s']:.2f} "
        f"requests/s, continuous batching's rate on a backlog. {REQUESTS} requests have 1 to 8 pictures, 4 to 16 steps "
        f"and guidance 1 or 3, {mean_network_rows():.0f} network rows on average. {data['max_pictures']} pictures are "
        f"in progress, in continuous batching up to {data['late']} more.",
        table,
        who_waits(data),
        out_of_reach(data),
    ]


if __name__ == "__main__":
    main("load", __doc__, measure)
