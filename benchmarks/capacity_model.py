"""The capacity model behind docs/scaling.md: from measured costs to devices, latency, and what breaks first.

Measures nothing: `scaling` takes the content of results.json.
"""

import math
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
from benchmarks.document import Plot, Table, number
from benchmarks.results import Data
from benchmarks.timing import percentile

DAY_S = 86_400
PEAK = 3.0  # the busiest hour's rate over the day's mean; a common rule of thumb, not measured
LOAD = 0.6  # of capacity at the peak
DAYS = (1_000, 100_000, 10_000_000)
NEEDED = ("service", "load", "growth")
SIMULATED_REQUESTS = 4000


@dataclass(frozen=True)
class Costs:
    """What was measured of one device, one picture and one Redis."""

    row_s: float  # of a device, for a network row
    beside_s: float  # of it, for a picture beside its rows: verdict, PNG, Redis, HTTP on the same cores
    step: StepCost
    max_pictures: int
    redis_bytes: float  # of a finished one-picture job, as long as it can be fetched
    redis_commands: float  # for one picture, from request to answer
    redis_commands_per_s: float  # that this Redis carries out, pipelined
    picture_bytes: float  # on the wire, as PNG
    served: tuple[int, int]  # steps and network rows a step of the checkpoint's own sampling
    ttl_s: float
    note_bytes: float  # that say, for `remembered_s` after its results are over, that a job has been
    remembered_s: float

    @classmethod
    def of(cls, content: Data) -> "Costs":
        sections = content["sections"]
        growth, load = sections["growth"], sections["load"]
        steps, rows = served = (growth["served"]["steps"], growth["served"]["rows"])
        picture_s = 1 / sections["service"]["figures"]["service.pictures_per_s"]["median"]
        bare_s = 1 / sections["service"]["bare_pictures_per_s"]["median"]
        return cls(
            row_s=bare_s / (steps * rows),
            beside_s=max(0.0, picture_s - bare_s),
            step=StepCost({int(rows): seconds for rows, seconds in load["step_s"].items()}),
            max_pictures=load["max_pictures"],
            redis_bytes=growth["store"][-1]["bytes_per_job"],
            redis_commands=sections["service"]["commands_per_picture"],
            redis_commands_per_s=sections["service"]["redis_commands_per_s"],
            picture_bytes=growth["png_bytes"],
            served=served,
            ttl_s=sections["service"]["ttl_s"],
            note_bytes=growth["note"]["bytes"],
            remembered_s=growth["note"]["remembered_s"],
        )

    def picture_s(self, rows: int) -> float:
        """Seconds of a device for a picture of so many network rows."""
        return rows * self.row_s + self.beside_s


def devices(pictures_per_s: float, picture_s: float, load: float = LOAD) -> int:
    """How many devices keep at or below `load` of their capacity."""
    return max(1, math.ceil(pictures_per_s * picture_s / load - 1e-9))


def alone_s(costs: Costs, steps: int, rows: int) -> float:
    """Seconds of one picture with nothing beside it; `rows` is network rows in a step."""
    return steps * costs.step(rows)


def the_same_requests(load: Data, cost: StepCost) -> dict[str, dict[str, list[float]]]:
    """What the model says of the requests that the load test served: their latencies, by load and policy."""
    found: dict[str, dict[str, list[float]]] = {}
    for share, by in load["latencies"].items():
        span_s, rate = load["spans_s"][share], float(share) * load["requests_per_s"]
        for name, measured in by.items():
            rounds = measured["requests"] // len(within(span_s, rate, seed=0))
            found.setdefault(share, {})[name] = [
                latency
                for seed in range(rounds)
                for latency in simulate(
                    POLICIES[name], within(span_s, rate, seed), cost, load["max_pictures"], load["few"]
                ).latencies
            ]
    return found


def check(load: Data, said: dict[str, dict[str, list[float]]]) -> tuple[Table, str]:
    """What the model said of the load test's requests beside what was measured, and how far apart they are."""
    table = Table(["load", "policy", "requests", "mean measured, s", "model", "p95 measured, s", "model"])
    means, tails = list[float](), list[float]()
    for share, by in load["latencies"].items():
        for name, found in by.items():
            latencies = said[share][name]
            mean, p95 = sum(latencies) / len(latencies), percentile(latencies, 0.95)
            means.append(found["mean"] / mean)
            tails.append(found["p95"] / p95)
            cells = (found["mean"], mean, found["p95"], p95)
            table.add(share, name, found["requests"], *map(number, cells))
    return table, (
        f"Measured means are {number(min(means))} to {number(max(means))} times the model's, p95s {number(min(tails))} "
        f"to {number(max(tails))} times."
    )


def sizing(costs: Costs, kinds: dict[str, tuple[int, int]]) -> Table:
    """Devices for a day's pictures, by kind of sampling: name -> (steps, network rows a step)."""
    header = ["pictures a day", "mean / peak a second", *(f"devices, {kind}" for kind in kinds)]
    table = Table(header)
    for day in DAYS:
        mean = day / DAY_S
        cells = [f"{devices(PEAK * mean, costs.picture_s(steps * rows)):,}" for steps, rows in kinds.values()]
        table.add(f"{day:,}", f"{number(mean)} / {number(PEAK * mean)}", *cells)
    return table


def redis_need(costs: Costs, day: int) -> Data:
    """What a day's pictures ask of Redis and network at the peak, and of storage if every picture were kept."""
    peak, notes_gib = PEAK * day / DAY_S, day / DAY_S * costs.remembered_s * costs.note_bytes / 2**30
    return {
        "memory_gib": peak * costs.ttl_s * costs.redis_bytes / 2**30 + notes_gib,
        "notes_gib": notes_gib,
        "commands_per_s": peak * costs.redis_commands,
        "commands_share": peak * costs.redis_commands / costs.redis_commands_per_s,
        "mbit_per_s": peak * costs.picture_bytes * 8 / 1e6,
        "kept_gib_per_day": day * costs.picture_bytes / 2**30,
    }


def redis_table(costs: Costs) -> Table:
    header = [
        "pictures a day",
        "Redis memory, GiB",
        "of that notes",
        "commands/s",
        "of one Redis",
        "PNG out, Mbit/s",
        "kept, GiB a day",
    ]
    table = Table(header)
    for day in DAYS:
        need = redis_need(costs, day)
        table.add(
            f"{day:,}",
            number(need["memory_gib"]),
            number(need["notes_gib"]),
            number(need["commands_per_s"]),
            f"{need['commands_share']:.1%}",
            number(need["mbit_per_s"]),
            number(need["kept_gib_per_day"]),
        )
    return table


def first_to_break(costs: Costs, day: int, rows_per_picture: int) -> str:
    """What a single machine with one device and one Redis of 4 GiB runs out of first."""
    peak, need = PEAK * day / DAY_S, redis_need(costs, day)
    shares = {
        "the device": peak * costs.picture_s(rows_per_picture),
        "Redis memory (of 4 GiB)": need["memory_gib"] / 4,
        "Redis commands": need["commands_share"],
        "a 1 Gbit/s network": need["mbit_per_s"] / 1000,
    }
    name = max(shares, key=lambda key: shares[key])
    rest = ", ".join(f"{key} {share:.2g}" for key, share in sorted(shares.items(), key=lambda i: -i[1]) if key != name)
    verb = "is beyond what there is" if shares[name] > 1 else "is the fullest"
    return f"{name} {verb} at {shares[name]:.2g} of it; then {rest}"


def flat_costs(costs: Costs) -> dict[str, float]:
    """Ratios on a device whose step takes the same time from 1 to 32 rows, as a large GPU's nearly does."""
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


def scaling(content: Data) -> list[str | Table | Plot]:
    """The document, or nothing where a section that it needs was not measured."""
    sections = content["sections"]
    if any("figures" not in sections.get(name, {}) for name in NEEDED):
        return []
    costs = Costs.of(content)
    steps, rows = costs.served
    as_shipped = f"{steps} {'guided ' if rows == 2 else ''}steps as shipped"
    kinds = {as_shipped: costs.served, "8 guided steps": (8, 2), "16 guided steps": (16, 2)}
    flat = flat_costs(costs)
    compared, how_well = check(sections["load"], the_same_requests(sections["load"], costs.step))
    shortest, queued = (sections["growth"]["queue"][i] for i in (0, -1))
    streams = sections["growth"]["streams"][-1]
    lines: list[str | Table | Plot] = [
        "# Scaling",
        "Written by `make bench` from what it measured (docs/performance.md says on what); do not edit. Assumed and "
        f"not measured are a peak of {PEAK:g} times the day's mean, {LOAD:g} of capacity at the peak, and that devices "
        "beside one another do not slow each other down, since they share nothing but Redis.",
        "## The model",
        f"In full batches a device takes {number(1000 * costs.row_s)} ms for a network row and "
        f"{number(1000 * costs.beside_s)} ms for what else the service does for a picture on the same cores. A picture "
        "of S steps has S rows, or 2 S with guidance. For pictures that arrive at a rate A, each of which takes D "
        f"seconds of a device, the number of devices is ceil(A D / {LOAD:g}). A picture alone takes S times "
        f"the time of one step: {number(1000 * alone_s(costs, *costs.served))} ms for {as_shipped}, "
        f"{number(1000 * alone_s(costs, 16, 2))} ms for 16 guided ones.",
        sizing(costs, kinds),
        "Latency under load has no short formula, since requests differ and share steps: it is what the scheduler "
        "itself does on a virtual clock, when a step costs what was measured for its rows. The load test of "
        "docs/performance.md, on the real network, checks it: here the model serves the very requests that were "
        "measured there. Runs are short, so a p95 rests on a few requests.",
        compared,
        how_well,
        "On this CPU a step costs nearly in proportion to its rows, so batching saves little and shares of capacity "
        "decide about latency. Where a step takes the same time for 1 row and for 32, as on a large GPU, the same "
        f"model, with {costs.max_pictures} pictures in work, gives {number(flat['throughput'])} times the throughput "
        f"of one at a time and, at {LOAD:g} of capacity, {number(flat['p95_ratio'])} of request-level batching's p95. "
        "That is simulated, not measured.",
        "## What breaks first",
        f"A finished picture holds {number(costs.redis_bytes)} bytes in Redis for {costs.ttl_s:.0f} s and, after that, "
        f"{number(costs.note_bytes)} for {costs.remembered_s:,.0f} s, which say that it has been. It costs "
        f"{number(costs.redis_commands)} Redis commands from request to answer; this Redis carries out "
        f"{number(costs.redis_commands_per_s)} commands/s, pipelined. At the peak:",
        redis_table(costs),
    ]
    ways_out = {
        1_000: "One machine with one worker carries it. Nothing needs to change.",
        100_000: "More workers (`--scale worker=N`, or KEDA by queue length) against the one Redis. They need no "
        "coordination: a picture is claimed from a stream. How many pictures a batch has, a worker finds by itself.",
        10_000_000: "Workers by the dozen on CPUs, as above, or a few GPUs; results out of Redis to object storage, "
        "with Redis keeping only keys and verdicts; a Redis for each model or region, since jobs of different models "
        "share nothing, or a cluster with the job's id as the hash tag; API processes behind a balancer: they hold no "
        "state. Results in object storage and a cluster would have to be built; the rest is there.",
    }
    for day in DAYS:
        lines.append(f"### {day:,} pictures a day")
        broken = first_to_break(costs, day, steps * rows)
        lines.append(f"{as_shipped}, one device, one Redis, at the peak: {broken}. {ways_out[day]}")
    lines += [
        "### What does not grow",
        f"With {queued['queued']:,} jobs queued, `GET /jobs/{{id}}` took {number(queued['read_ms'])} ms; with "
        f"{streams['streams']:,} open event streams {number(streams['read_ms'])} ms, and the last stream heard of its "
        f"job's end {number(streams['end_s'])} s after it. A worker made {number(queued['pictures_per_s']['median'])} "
        f"pictures/s of that queue, {number(shortest['pictures_per_s']['median'])} of one of {shortest['queued']:,}. "
        "`max_queued_pictures` refuses more (429) long before a queue of that length, which would keep one device busy "
        f"for {number(queued['queued'] * costs.picture_s(steps * rows) / 60)} minutes.",
    ]
    return lines
