"""The capacity model in docs/performance.md: number of devices, latency and bottlenecks, from measured costs.

Measures nothing: `capacity` takes the content of results.json.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.batching import (
    POLICIES,
    StepCost,
    continuous,
    one_at_a_time,
    poisson,
    request_level,
    simulate,
    within,
)
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data
from benchmarks.timing import percentile
from service.settings import Settings

DAY_S = 86_400
PEAK = 3.0  # the busiest hour's rate relative to the daily mean; a common rule of thumb, not measured
LOAD = 0.6  # target load at the peak, as a fraction of capacity
DAYS = (1_000, 100_000, 10_000_000)
NEEDED = ("service", "load", "growth")
SIMULATED_REQUESTS = 4000
MOST_QUEUED: int = Settings.model_fields["max_queued_pictures"].default


@dataclass(frozen=True)
class Costs:
    """The measured costs of one device, one picture and one Redis."""

    row_s: float  # device seconds per network row
    other_s: float  # device seconds per picture for all else on the same cores: verdict, PNG, Redis, HTTP
    step: StepCost
    max_pictures: int
    redis_bytes: float  # per finished one-picture job, until it expires
    redis_commands: float  # per picture, from request to answer
    redis_commands_per_s: float  # throughput of this Redis, pipelined
    picture_bytes: float  # of a PNG on the wire
    served: tuple[int, ...]  # network rows of each step of the checkpoint's default sampling
    kept_s: float  # until a finished job expires

    @classmethod
    def of(cls, content: Data) -> "Costs":
        sections = content["sections"]
        growth, load = sections["growth"], sections["load"]
        served = tuple(growth["served_rows"])
        picture_s = 1 / sections["service"]["figures"]["service.pictures_per_s"]["median"]
        bare_s = 1 / sections["service"]["bare_pictures_per_s"]["median"]
        return cls(
            row_s=bare_s / sum(served),
            other_s=max(0.0, picture_s - bare_s),
            step=StepCost({int(rows): seconds for rows, seconds in load["step_s"].items()}),
            max_pictures=load["max_pictures"],
            redis_bytes=growth["store"][-1]["bytes_per_job"],
            redis_commands=sections["service"]["commands_per_picture"],
            redis_commands_per_s=sections["service"]["redis_commands_per_s"],
            picture_bytes=growth["png_bytes"],
            served=served,
            kept_s=sections["service"]["kept_s"],
        )

    def picture_s(self, rows: int) -> float:
        """Return the device seconds of a picture with `rows` network rows."""
        return rows * self.row_s + self.other_s


def devices(pictures_per_s: float, picture_s: float, load: float = LOAD) -> int:
    """Return the number of devices whose load does not exceed `load`."""
    return max(1, math.ceil(pictures_per_s * picture_s / load - 1e-9))


def alone_s(costs: Costs, rows: Sequence[int]) -> float:
    """Return the seconds of one picture on an idle device. `rows`: network rows of each step."""
    return sum(map(costs.step, rows))


def the_same_requests(load: Data, cost: StepCost) -> dict[str, dict[str, list[float]]]:
    """Simulate the very requests of the load test: their latencies by load and policy."""
    found: dict[str, dict[str, list[float]]] = {}
    for share, by in load["latencies"].items():
        span_s, rate = load["spans_s"][share], float(share) * load["requests_per_s"]
        for name, measured in by.items():
            rounds = measured["requests"] // len(within(span_s, rate, seed=0))
            found.setdefault(share, {})[name] = [
                latency
                for seed in range(rounds)
                for latency in simulate(
                    POLICIES[name], within(span_s, rate, seed), cost, load["max_pictures"], load["few"], load["late"]
                ).latencies
            ]
    return found


def check(load: Data, simulated: dict[str, dict[str, list[float]]]) -> str:
    """Compare the model's latencies with the measured ones: return the range of their ratios."""
    means, tails = list[float](), list[float]()
    for share, by in load["latencies"].items():
        for name, found in by.items():
            latencies = simulated[share][name]
            means.append(found["mean"] * len(latencies) / sum(latencies))
            tails.append(found["p95"] / percentile(latencies, 0.95))
    return (
        f"the measured means are {number(min(means))} to {number(max(means))} times the model's, the measured p95s "
        f"{number(min(tails))} to {number(max(tails))} times"
    )


def sizing(costs: Costs, kinds: dict[str, tuple[int, ...]]) -> Table:
    """Return the table of devices needed, by pictures per day. `kinds`: name -> network rows of each step."""
    header = ["pictures/day", "mean / peak per second", *(f"devices, {kind}" for kind in kinds)]
    table = Table(header)
    for day in DAYS:
        mean = day / DAY_S
        cells = [f"{devices(PEAK * mean, costs.picture_s(sum(rows))):,}" for rows in kinds.values()]
        table.add(f"{day:,}", f"{number(mean)} / {number(PEAK * mean)}", *cells)
    return table


def redis_need(costs: Costs, day: int) -> Data:
    """Return what `day` pictures per day need of Redis, network and storage; commands and bandwidth at the peak."""
    peak = PEAK * day / DAY_S
    kept = (peak if costs.kept_s < DAY_S else day / DAY_S) * costs.kept_s  # pictures
    return {
        "memory_gib": kept * costs.redis_bytes / 2**30,
        "commands_per_s": peak * costs.redis_commands,
        "commands_share": peak * costs.redis_commands / costs.redis_commands_per_s,
        "mbit_per_s": peak * costs.picture_bytes * 8 / 1e6,
        "storage_gib": kept * costs.picture_bytes / 2**30,
    }


def redis_table(costs: Costs) -> Table:
    header = [
        "pictures/day",
        "Redis memory, GiB",
        "commands/s",
        "fraction of one Redis",
        "PNGs sent, Mbit/s",
        "pictures in storage, GiB",
    ]
    table = Table(header)
    for day in DAYS:
        need = redis_need(costs, day)
        table.add(
            f"{day:,}",
            number(need["memory_gib"]),
            number(need["commands_per_s"]),
            f"{need['commands_share']:.1%}",
            number(need["mbit_per_s"]),
            number(need["storage_gib"]),
        )
    return table


def first_to_break(costs: Costs, day: int, rows_per_picture: int) -> str:
    """Say what a machine with one device and one Redis of 4 GiB runs out of first."""
    peak, need = PEAK * day / DAY_S, redis_need(costs, day)
    shares = {
        "the device": peak * costs.picture_s(rows_per_picture),
        "Redis memory (of 4 GiB)": need["memory_gib"] / 4,
        "Redis commands": need["commands_share"],
        "a 1 Gbit/s network": need["mbit_per_s"] / 1000,
    }
    name = max(shares, key=lambda key: shares[key])
    rest = ", ".join(f"{key} {share:.2g}" for key, share in sorted(shares.items(), key=lambda i: -i[1]) if key != name)
    most, unit = ("bottleneck", "times") if shares[name] > 1 else ("most used resource", "of")
    return f"the {most} is {name}, at {shares[name]:.2g} {unit} its capacity; then {rest}"


def flat_costs(costs: Costs) -> dict[str, float]:
    """Compare policies on a device whose step takes equally long for 1 and for 32 rows, almost as on a large GPU."""
    flat = StepCost({1: 1.0, 1000: 1.0 + 1e-9})
    backlog = poisson(1e9, SIMULATED_REQUESTS, 1)
    ended = {p: simulate(p, backlog, flat, costs.max_pictures).ended_at for p in (continuous, one_at_a_time)}
    rate = LOAD * len(backlog) / ended[continuous]
    arrivals = poisson(rate, SIMULATED_REQUESTS, 7)
    p95 = {
        policy: percentile(simulate(policy, arrivals, flat, costs.max_pictures).latencies, 0.95)
        for policy in (continuous, request_level)
    }
    return {
        "throughput": ended[one_at_a_time] / ended[continuous],
        "p95_ratio": p95[continuous] / p95[request_level],
    }


def capacity(content: Data) -> list[Piece]:
    """Return the pieces about capacity, or nothing if a section that they need was not measured."""
    sections = content["sections"]
    if any("figures" not in sections.get(name, {}) for name in NEEDED):
        return []
    costs = Costs.of(content)
    as_shipped = f"{len(costs.served)} steps as shipped"
    kinds = {as_shipped: costs.served, "8 guided steps": (2,) * 8, "16 guided steps": (2,) * 16}
    flat = flat_costs(costs)
    how_well = check(sections["load"], the_same_requests(sections["load"], costs.step))
    ways_out = {
        1_000: "One machine with one worker is enough.",
        100_000: "Add workers (`--scale worker=N`, or KEDA by the backlog).",
        10_000_000: "Add workers and API processes, keep pictures in object storage, and run "
        "[several deployments](scaling.md#after-one-redis).",
    }
    return [
        "## Capacity",
        "How many devices a number of pictures per day needs:",
        sizing(costs, kinds),
        f"Computed from the sections above. Assumed, not measured: the peak is {PEAK:g} times the daily mean, the load "
        f"at the peak is {LOAD:g} of capacity, and devices, which share only Redis, do not slow each other down.",
        f"With full batches, a device takes {number(1000 * costs.row_s)} ms per network row, and "
        f"{number(1000 * costs.other_s)} ms for all else that a picture needs. As shipped, a picture has "
        f"{sum(costs.served)} rows. For A pictures per second of D device seconds you need ceil(A D / {LOAD:g}) "
        f"devices. On an idle device, a picture takes {number(1000 * alone_s(costs, costs.served))} ms with "
        f"{as_shipped}, {number(1000 * alone_s(costs, (2,) * 16))} ms with 16 guided ones.",
        f"For the requests of the [load test](#batching-under-load), {how_well}; its runs are short, so a p95 depends "
        f"on few requests. Where 1 row takes as long as 32, as on a large GPU, the model gives "
        f"{number(flat['throughput'])} times the throughput of one at a time and, at a load of {LOAD:g}, "
        f"{number(flat['p95_ratio'])} of the p95 of request-level batching ({costs.max_pictures} pictures in "
        "progress).",
        f"A finished job of one picture takes {number(costs.redis_bytes)} bytes in Redis, and its PNG "
        f"{number(costs.picture_bytes)} bytes in storage, for {costs.kept_s / DAY_S:g} days (`LABELGRID_KEEP_DAYS`). "
        f"It takes {number(costs.redis_commands)} Redis commands from request to answer; this Redis executes "
        f"{number(costs.redis_commands_per_s)} commands/s, pipelined. At the peak:",
        redis_table(costs),
        f"With one device, one Redis and {as_shipped}:",
        "\n".join(f"- {day:,} a day: {first_to_break(costs, day, sum(costs.served))}. {ways_out[day]}" for day in DAYS),
        f"Beyond {MOST_QUEUED:,} pending pictures of a model (`max_queued_pictures`) requests are refused (429): these "
        f"keep one device busy for {number(MOST_QUEUED * costs.picture_s(sum(costs.served)) / 60)} minutes.",
    ]
