"""What one Redis and one API process carry: `python -m benchmarks.sections.scaling`.

A toy network costs next to nothing, so that the service's own work is what is measured: CPU seconds of Redis and API
for each picture, by pictures per request, and what workers that have nothing to do cost Redis. CPU seconds depend
little on other work on the machine. A simulation says how long commands wait in a busy Redis.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from redis import Redis

from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.sections.service import commands, saturate
from benchmarks.stack import Stack, cpu_s, stack
from benchmarks.timing import figure
from tests.toy_checkpoint import publish_toys

SIZES = {1: 1500, 8: 200, 64: 32}  # pictures of a request -> requests
IDLE_WORKERS, IDLE_S = 4, 20.0
LOAD = 0.6  # of a core: above it waiting grows fast
LOADS = 0.3, 0.6, 0.8, 0.9
SIMULATED_COMMANDS = 400_000
KEPT = "api_ms", "redis_ms", "commands", "bytes"


def used_bytes(redis: Redis) -> int:
    return int(redis.info("memory")["used_memory"])


def per_picture(running: Stack, redis: Redis, requests: int, size: int) -> Data:
    """Return what a picture costs: CPU ms of API and Redis, commands, and bytes that stay in Redis."""
    pids, pictures = running.pids(), requests * size
    redis.config_resetstat()
    before = {name: cpu_s(pids[name]) for name in ("API", "Redis")}, commands(redis), used_bytes(redis)
    saturate(running.port, requests, size=size)
    cpu = {name: (cpu_s(pids[name]) - begun) / pictures * 1000 for name, begun in before[0].items()}
    return {
        "api_ms": cpu["API"],
        "redis_ms": cpu["Redis"],
        "commands": (commands(redis) - before[1]) / pictures,
        "bytes": (used_bytes(redis) - before[2]) / pictures,
        "kinds": [(one["calls"], one["usec_per_call"]) for one in redis.info("commandstats").values()],
    }


def redis_share(running: Stack, span_s: float) -> float:
    """Return the share of a core that Redis takes while nothing is asked for."""
    assert running.redis.process is not None
    begun = cpu_s(running.redis.process.pid)
    time.sleep(span_s)
    return (cpu_s(running.redis.process.pid) - begun) / span_s


def service_times(one: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds that Redis takes for each kind of command, reading and writing included, and their shares."""
    calls, taken_us = np.array(one["kinds"]).T
    shares = calls / calls.sum()
    whole_s = one["redis_ms"] / one["commands"] / 1000
    executing_s = taken_us / 1e6
    return executing_s + max(0.0, whole_s - float(shares @ executing_s)), shares


def waits_s(times_s: np.ndarray, shares: np.ndarray, load: float, count: int = SIMULATED_COMMANDS) -> np.ndarray:
    """Simulate commands that come at random to one server, which takes them in order; return how long each waits."""
    rng = np.random.default_rng(0)
    served = rng.choice(times_s, count, p=shares)
    between = rng.exponential(served.mean() / load, count)
    backlog = np.concatenate(([0.0], np.cumsum(served[:-1] - between[1:])))  # Lindley's recursion, unrolled
    return backlog - np.minimum.accumulate(backlog)


def measure(quick: bool) -> Data:
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as storage:
        publish_toys(Path(storage))
        with stack(LABELGRID_STORAGE=storage) as running:
            redis = Redis.from_url(running.redis.url)
            saturate(running.port, 32)  # warm
            costs = {}
            for size, requests in SIZES.items():
                costs[size] = per_picture(running, redis, max(4, requests // 20) if quick else requests, size)
                say(f"  {size} pictures in a request")
            idle_s = 3.0 if quick else IDLE_S
            alone = redis_share(running, idle_s)
            running.start_workers(IDLE_WORKERS)
            more = redis_share(running, idle_s)
    times_s, shares = service_times(costs[1])
    waits = {load: waits_s(times_s, shares, load) for load in LOADS}
    return {
        "figures": {f"scaling.redis_ms_{size}": figure([one["redis_ms"]]) for size, one in costs.items()}
        | {f"scaling.api_ms_{size}": figure([one["api_ms"]]) for size, one in costs.items()},
        "costs": {size: {key: one[key] for key in KEPT} for size, one in costs.items()},
        "idle_worker_share": max(0.0, more - alone) / IDLE_WORKERS,
        "command_us": float(times_s @ shares) * 1e6,
        "waits_ms": {load: [float(np.quantile(one, q)) * 1000 for q in (0.5, 0.99)] for load, one in waits.items()},
    }


def report(data: Data) -> list[Piece]:
    header = ["pictures per request", "Redis, CPU ms per picture", "API, CPU ms per picture", "commands per picture"]
    table = Table([*header, "bytes that stay in Redis", "pictures/s of one Redis", "API processes for these"])
    for size, one in data["costs"].items():
        rate = LOAD / one["redis_ms"] * 1000
        costs: Sequence[float] = (one["redis_ms"], one["api_ms"], one["commands"], one["bytes"], rate)
        table.add(size, *map(number, costs), number(rate * one["api_ms"] / 1000 / LOAD))
    waits = ", ".join(f"{number(p99)} ms at {float(load):.0%}" for load, (_, p99) in data["waits_ms"].items())
    return [
        "With a toy network, what is left is the service's own work. One worker, 32 clients with one open request "
        f"each. The last two columns are for Redis and API processes that are busy {LOAD:.0%} of the time.",
        table,
        f"An idle worker takes {100 * data['idle_worker_share']:.2g} % of a core in Redis. A command waits at p99, by "
        f"how busy Redis is, {waits} (simulated: commands at random times, {number(data['command_us'])} µs each).",
    ]


if __name__ == "__main__":
    main("scaling", __doc__, measure)
