"""How far off forecasts are: `python -m benchmarks.sections.waits`.

Mixed requests are queued, and the forecast of each job (`eta`) is compared with its end: of requests that arrive at
random, the forecast that they are answered with; of a burst, that after its last request; and of a burst of which one
of two workers is killed.
"""

import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from benchmarks.clients import Body
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.sections.servers import mixed
from benchmarks.stack import WAIT_S, Stack, stack
from benchmarks.timing import figure, percentile
from service.contract.records import TERMINAL
from service.settings import Settings

LOAD = 0.6  # of the rate of the burst before, at which requests arrive
WARM, BURST, ARRIVING = 6, 20, 30  # requests
KILLED_AT = 0.25  # of a burst's jobs are done
LEASE_S = 15  # after which the pictures of a killed worker are taken over
HEARTBEAT_S = Settings(lease_s=LEASE_S).heartbeat_s + 1  # within which a worker says how fast it is
LOOK_S = 0.2
GOAL = 0.2


class Seen(NamedTuple):
    """What a job was forecast to take, and what it took, in seconds from then."""

    forecast_s: float
    took_s: float

    @property
    def error(self) -> float:
        return abs(self.forecast_s - self.took_s) / self.took_s


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def served(
    running: Stack, bodies: Sequence[Body], times: Sequence[float] = (), meanwhile: Callable[[int], None] | None = None
) -> tuple[list[Seen], float]:
    """Queue requests, each at its time, and wait for all jobs. Return forecasts and times, and the seconds of it all.

    Without times, forecasts are read once all are queued. Calls `meanwhile` again and again with the number of jobs
    that have ended. Jobs without a forecast, as they have ended, are left out.
    """
    with running.client() as client:
        begun, queued = time.perf_counter(), list[tuple[float, dict[str, Any]]]()
        for body, due in zip(bodies, times or [0.0] * len(bodies), strict=True):
            time.sleep(max(0.0, begun + due - time.perf_counter()))
            answer = client.post("/generate", json=dict(body), headers={"Prefer": "respond-async"})
            queued.append((time.time(), answer.raise_for_status().json()))
        if not times:
            queued = [(time.time(), client.get(f"/jobs/{job['id']}").raise_for_status().json()) for _, job in queued]
        ended, deadline = dict[str, dict[str, Any]](), time.monotonic() + WAIT_S
        while len(ended) < len(queued):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(queued) - len(ended)} jobs have not ended within {WAIT_S} s")
            time.sleep(LOOK_S)
            for _, job in queued:
                if job["id"] not in ended:
                    now = client.get(f"/jobs/{job['id']}").raise_for_status().json()
                    ended |= {job["id"]: now} if now["status"] in TERMINAL else {}
            if meanwhile is not None:
                meanwhile(len(ended))
        taken = time.perf_counter() - begun
    if failed := [one["error"] for one in ended.values() if one["status"] != "finished"]:
        raise RuntimeError(f"{len(failed)} jobs have not finished: {failed[0]}")
    return [
        Seen(at(job["eta"]) - read_at, at(ended[job["id"]]["finished_at"]) - read_at)
        for read_at, job in queued
        if job["eta"] and at(ended[job["id"]]["finished_at"]) > read_at
    ], taken


def measure(quick: bool) -> Data:
    burst, arriving = (8, 8) if quick else (BURST, ARRIVING)
    seen = dict[str, list[Seen]]()
    with stack(LABELGRID_LEASE_S=str(LEASE_S)) as running:
        served(running, mixed(WARM, seed=1))
        time.sleep(HEARTBEAT_S)
        seen["burst"], taken_s = served(running, mixed(burst, seed=2))
        say(f"  burst of {burst}: {taken_s:.0f} s")
        gaps = np.random.default_rng(3).exponential(taken_s / burst / LOAD, arriving)
        seen["arriving"], taken_s = served(running, mixed(arriving, seed=3), gaps.cumsum().tolist())
        say(f"  {arriving} at random: {taken_s:.0f} s")
    with stack(2, LABELGRID_LEASE_S=str(LEASE_S)) as running:
        served(running, mixed(WARM, seed=1))
        time.sleep(HEARTBEAT_S)
        victim = running.workers.pop()

        def kill(ended: int) -> None:
            if ended >= KILLED_AT * burst and victim.poll() is None:
                os.kill(victim.pid, signal.SIGKILL)
                victim.wait()

        seen["killed"], taken_s = served(running, mixed(burst, seed=2), meanwhile=kill)
        say(f"  burst of {burst}, a worker killed: {taken_s:.0f} s")
    return {
        "figures": {f"waits.error_{name}": figure(one.error for one in found) for name, found in seen.items()},
        "took_s": {name: statistics.median(one.took_s for one in found) for name, found in seen.items()},
        "bias": {name: statistics.median(one.forecast_s / one.took_s for one in found) for name, found in seen.items()},
        "p90": {name: percentile([one.error for one in found], 0.9) for name, found in seen.items()},
    }


def report(data: Data) -> list[Piece]:
    words = {
        "arriving": f"at random, at {LOAD} of the burst's rate",
        "burst": "all at once",
        "killed": "all at once, one of two workers killed",
    }
    table = Table(["mixed requests", "jobs", "median time, s", "median error", "p90", "forecast over time, median"])
    for name, what in words.items():
        found = data["figures"][f"waits.error_{name}"]
        cells = found["median"], data["p90"][name], data["bias"][name]
        table.add(what, found["n"], number(data["took_s"][name]), *map(number, cells))
    return [
        "Each job's `eta`, when its request is answered or, of a burst, after the last one, compared with its end; "
        f"the goal is {GOAL}. A forecast foresees neither requests nor deaths. Pictures of the killed worker are taken "
        f"over after {LEASE_S} s.",
        table,
    ]


if __name__ == "__main__":
    main("waits", __doc__, measure)
