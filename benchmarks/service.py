"""The service against its own sampling loop: `python -m benchmarks.service`.

32 clients at once, each with one request open, over the bare loop at the worker's batch size; and one picture alone,
end to end over HTTP, over the loop for one picture. Service and bare loop take turns; while one works the other sleeps.
"""

import threading
import time
from collections.abc import Callable

import httpx
from redis import Redis

from benchmarks import subject
from benchmarks.common import Data, figure, main, ratios, say, seconds
from benchmarks.document import Table, number
from benchmarks.stack import stack
from service.jobs import connect
from service.settings import Settings
from shared.denoise import sample
from shared.model import Denoiser

CLIENTS = 32


def post(client: httpx.Client, labels: list[list[str]], seed: int) -> float:
    """One POST /generate from send to answer, in s."""
    start = time.perf_counter()
    answer = client.post("/generate", json={"labels": labels, "seed": seed}, headers={"Prefer": "wait=250"})
    answer.raise_for_status()
    if answer.json()["status"] != "finished":
        raise RuntimeError(f"the job is {answer.json()['status']}")
    return time.perf_counter() - start


def saturate(client: httpx.Client, requests: int, clients: int = CLIENTS) -> float:
    """Pictures/s of `clients` that each send the next one-picture request when the last is answered."""
    lists, waiting, errors = subject.label_lists(requests), iter(range(requests)), []
    lock = threading.Lock()

    def one_of_them() -> None:
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                return
            try:
                post(client, [lists[number]], seed=number)
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=one_of_them) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed, the first with {errors[0]!r}")
    return requests / (time.perf_counter() - start)


def bare(ours: Denoiser, count: int, batch: int, rows: int) -> Callable[[], float]:
    """Pictures/s of the loop alone, `batch` pictures at a time as in the worker: no evaluator, PNG or Redis."""
    stepper = ours.stepper(max_rows=rows)
    hot = subject.multi_hot(subject.label_lists(count), ours.vocabulary)

    def run() -> float:
        start = time.perf_counter()
        for first in range(0, count, batch):
            part = slice(first, first + batch)
            sample(stepper, hot[part], ours.options, subject.seeds(count)[part])
        return count / (time.perf_counter() - start)

    return run


def commands(redis: Redis) -> int:
    """Commands that Redis has carried out so far."""
    return int(redis.info("stats")["total_commands_processed"])


def redis_rate(redis: Redis, count: int) -> float:
    """Commands/s of Redis from one client, a hundred SETs of 100 bytes and GETs at a time."""

    def run() -> None:
        for _ in range(count // 200):
            with redis.pipeline(transaction=False) as pipe:
                for i in range(100):
                    pipe.set(f"benchmark:{i}", b"x" * 100)
                    pipe.get(f"benchmark:{i}")
                pipe.execute()

    return count / seconds(run)


def measure(quick: bool) -> Data:
    requests, rounds, singles = (16, 1, 3) if quick else (96, 4, 15)
    ours, settings = subject.denoiser(), Settings()
    batch, rows = subject.batch_limit(ours, settings)
    loop = bare(ours, max(batch, requests // 2 // batch * batch), batch, rows)
    stepper = ours.stepper(max_rows=rows)
    hot = subject.multi_hot(subject.label_lists(1), ours.vocabulary)
    same = {"LABELGRID_BATCH_PICTURES": str(batch), "LABELGRID_BATCH_ROWS": str(rows)}
    with stack(**same) as running, running.client() as client:
        say(f"  the service is up; batches of {batch} pictures")
        post(client, subject.label_lists(batch), 0)  # warm
        loop()
        served, alone = [], []
        for _ in range(rounds):
            served.append(saturate(client, requests))
            alone.append(loop())
        redis = connect(running.redis.url)
        before = commands(redis)
        saturate(client, requests)
        per_picture = (commands(redis) - before) / requests
        say(f"  {requests} requests of {CLIENTS} clients against the bare loop, {rounds} rounds: done")
        end_to_end, one = [], []
        for number_ in range(singles + 1):
            end_to_end.append(post(client, subject.label_lists(1), number_))
            one.append(seconds(lambda: sample(stepper, hot, ours.options, [1])))
        rate = redis_rate(redis, 2000 if quick else 40_000)
    end_to_end, one = end_to_end[1:], one[1:]
    return {
        "figures": {
            "service.saturation_fraction": figure(ratios(served, alone)),
            "service.pictures_per_s": figure(served),
            "service.single_overhead_ms": figure((a - b) * 1000 for a, b in zip(end_to_end, one, strict=True)),
            "service.single_ratio": figure(ratios(end_to_end, one)),
        },
        "bare_pictures_per_s": figure(alone),
        "single_ms": figure(s * 1000 for s in end_to_end),
        "single_loop_ms": figure(s * 1000 for s in one),
        "batch": batch,
        "commands_per_picture": per_picture,
        "redis_commands_per_s": rate,
        "ttl_s": settings.job_ttl_s,
        "requests": requests,
        "singles": singles,
        "goal_ms": figure(b * 150 + 10 for b in one),
    }


def report(data: Data) -> list[str | Table]:
    figures = data["figures"]
    table = Table(["what", "service", "bare loop", "ratio", "spread of the ratio"])
    fraction, ratio = figures["service.saturation_fraction"], figures["service.single_ratio"]
    table.add(
        f"pictures/s, {CLIENTS} clients, batch {data['batch']}",
        number(figures["service.pictures_per_s"]["median"]),
        number(data["bare_pictures_per_s"]["median"]),
        f"{fraction['median']:.3f}",
        f"{fraction['spread']:.3f}",
    )
    table.add(
        "one picture alone, ms",
        number(data["single_ms"]["median"]),
        number(data["single_loop_ms"]["median"]),
        f"{ratio['median']:.3f}",
        f"{ratio['spread']:.3f}",
    )
    overhead = figures["service.single_overhead_ms"]["median"]
    allowed = data["goal_ms"]["median"]
    return [
        f"The service answers over HTTP with verdict, PNG and grid; the bare loop only samples. {data['requests']} "
        f"requests a round, {data['singles']} single pictures. A single picture costs {number(overhead)} ms beside the "
        f"loop's own time; the goal, 0.15 of the loop's time and 10 ms, allows {number(allowed)} ms.",
        table,
    ]


if __name__ == "__main__":
    main("service", __doc__, measure)
