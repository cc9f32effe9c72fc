"""What one Redis and one API process carry: `python -m benchmarks.sections.scaling`.

A toy network costs next to nothing, so that the service's own work is what is measured: CPU seconds of Redis and API
for each picture, by pictures per request, and what workers that have nothing to do cost Redis. CPU seconds depend
little on other work on the machine.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from redis import Redis

from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.sections.service import saturate
from benchmarks.stack import Stack, cpu_s, stack
from benchmarks.timing import figure
from tests.toy_checkpoint import publish_toys

SIZES = {1: 1500, 8: 200, 64: 32}  # pictures of a request -> requests
IDLE_WORKERS, IDLE_S = 4, 20.0
LOAD = 0.6  # of a core: above it waiting grows fast


@contextlib.contextmanager
def toy_service(workers: int = 1, **environment: str) -> Iterator[tuple[Stack, Redis]]:
    """Run a service with toy checkpoints, and connect to its Redis."""
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as storage, contextlib.ExitStack() as running:
        publish_toys(Path(storage))
        found = running.enter_context(stack(workers, LABELGRID_STORAGE=storage, **environment))
        yield found, running.enter_context(Redis.from_url(found.redis.url))


def commands(redis: Redis) -> int:
    """Return how many commands Redis has executed so far, those inside scripts included."""
    return int(redis.info("stats")["total_commands_processed"])


def used_bytes(redis: Redis) -> int:
    return int(redis.info("memory")["used_memory"])


def per_picture(running: Stack, redis: Redis, requests: int, size: int) -> Data:
    """Return what a picture costs: CPU ms of API and Redis, commands, and bytes that stay in Redis."""
    pids, pictures = running.pids(), requests * size
    before = {name: cpu_s(pids[name]) for name in ("API", "Redis")}, commands(redis), used_bytes(redis)
    saturate(running.port, requests, size=size)
    cpu = {name: (cpu_s(pids[name]) - begun) / pictures * 1000 for name, begun in before[0].items()}
    return {
        "api_ms": cpu["API"],
        "redis_ms": cpu["Redis"],
        "commands": (commands(redis) - before[1]) / pictures,
        "bytes": (used_bytes(redis) - before[2]) / pictures,
    }


def redis_share(running: Stack, span_s: float) -> float:
    """Return the share of a core that Redis takes while nothing is asked for."""
    assert running.redis.process is not None
    begun = cpu_s(running.redis.process.pid)
    time.sleep(span_s)
    return (cpu_s(running.redis.process.pid) - begun) / span_s


def measure(quick: bool) -> Data:
    idle_s, costs = 3.0 if quick else IDLE_S, {}
    with toy_service() as (running, redis):
        saturate(running.port, 32)  # warm
        for size, requests in SIZES.items():
            costs[size] = per_picture(running, redis, max(4, requests // 20) if quick else requests, size)
            say(f"  {size} pictures in a request")
        alone = redis_share(running, idle_s)
        running.start_workers(IDLE_WORKERS)
        more = redis_share(running, idle_s)
    return {
        "figures": {f"scaling.redis_ms_{size}": figure([one["redis_ms"]]) for size, one in costs.items()}
        | {f"scaling.api_ms_{size}": figure([one["api_ms"]]) for size, one in costs.items()},
        "costs": costs,
        "idle_worker_share": max(0.0, more - alone) / IDLE_WORKERS,
    }


def report(data: Data) -> list[Piece]:
    header = ["pictures per request", "Redis, CPU ms per picture", "API, CPU ms per picture", "commands per picture"]
    table = Table([*header, "bytes that stay in Redis", "pictures/s of one Redis", "API processes for these"])
    for size, one in data["costs"].items():
        rate = LOAD / one["redis_ms"] * 1000
        costs: Sequence[float] = (one["redis_ms"], one["api_ms"], one["commands"], one["bytes"], rate)
        table.add(size, *map(number, costs), number(rate * one["api_ms"] / 1000 / LOAD))
    return [
        "With a toy network, what is left is the service's own work. One worker, 32 clients with one open request "
        f"each. The last two columns are for Redis and API processes that are busy {LOAD:.0%} of the time.",
        table,
        f"An idle worker takes {100 * data['idle_worker_share']:.2g} % of a core in Redis.",
    ]


if __name__ == "__main__":
    main("scaling", __doc__, measure)
