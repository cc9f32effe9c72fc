"""Batching policies under random load, simulated: Poisson arrivals, and steps that take what was measured.

Knows no network: a picture is a number of steps, each with some network rows.
"""

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from service.worker.step_order import Workload, jobs_to_step, room
from shared.options import network_rows

SIZES = range(1, 9)  # pictures of a request
STEPS = (4, 8, 12, 16)
GUIDANCE = (1.0, 3.0)


@dataclass(frozen=True)
class Arrival:
    """A request: its time of arrival, in s, its pictures, and the steps and network rows of each picture."""

    at: float
    pictures: int
    steps: int
    rows: int  # of a step

    @property
    def network_rows(self) -> int:
        return self.pictures * self.steps * self.rows


def poisson(rate: float, count: int, seed: int) -> list[Arrival]:
    """Draw `count` requests of mixed sizes, steps and guidance that arrive at `rate` per second on average, from 0 on.

    Their options depend on the seed only: at another rate the same requests arrive, closer together or farther apart.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(size=count)
    wants = [
        (int(rng.choice(SIZES)), int(rng.choice(STEPS)), network_rows(float(rng.choice(GUIDANCE))))
        for _ in range(count)
    ]
    return [Arrival(at / rate, *want) for at, want in zip(np.cumsum(gaps).tolist(), wants, strict=True)]


def mean_network_rows() -> float:
    """Return the average number of network rows of a request."""
    return float(np.mean(SIZES) * np.mean(STEPS) * np.mean([network_rows(w) for w in GUIDANCE]))


class StepCost:
    """Seconds of one step by its network rows: linear between the measured sizes and beyond the largest."""

    def __init__(self, measured: dict[int, float]) -> None:
        """`measured`: network rows -> seconds, two sizes at least."""
        self.sizes = sorted(measured)
        self.seconds = [measured[size] for size in self.sizes]

    def __call__(self, rows: int) -> float:
        if rows <= self.sizes[0]:
            return self.seconds[0]
        right = min(bisect.bisect_left(self.sizes, rows), len(self.sizes) - 1)
        (x0, x1), (y0, y1) = self.sizes[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)


@dataclass(eq=False)
class Request:
    """A request being served."""

    arrival: Arrival
    to_begin: int  # pictures that have not begun
    open: int  # pictures that are not finished
    since: int = 0  # network rows computed before its last picture began
    answered_at: float = 0.0


@dataclass(eq=False)
class Picture:
    """A picture in progress."""

    request: Request
    steps_left: int

    @property
    def rows(self) -> int:
        return self.request.arrival.rows


# A policy decides how many pictures of each queued request begin now:
# (queue, pictures in progress, room) -> a number for each request from the front of the queue on.
Policy = Callable[[Iterable[Request], int, int], list[int]]


def continuous(queue: Iterable[Request], in_progress: int, room: int) -> list[int]:
    """Continuous batching: pictures join at any step if there is room."""
    return _fill(queue, room, whole=False)


def request_level(queue: Iterable[Request], in_progress: int, room: int) -> list[int]:
    """Request-level batching: whole requests form a batch, which runs to its end. The first always fits."""
    return [] if in_progress else _fill(queue, room, whole=True)


def one_at_a_time(queue: Iterable[Request], in_progress: int, room: int) -> list[int]:
    """No batching: one picture after the other."""
    return [] if in_progress else [1]


def _fill(queue: Iterable[Request], room: int, *, whole: bool) -> list[int]:
    taken: list[int] = []
    for request in queue:
        wanted = request.to_begin
        if room <= 0 or (whole and taken and wanted > room):
            break
        taken.append(wanted if whole else min(wanted, room))
        room -= taken[-1]
    return taken


POLICIES: dict[str, Policy] = {
    "continuous": continuous,
    "request-level": request_level,
    "one at a time": one_at_a_time,
}


@dataclass(frozen=True)
class Served:
    """The outcome of serving some arrivals."""

    latencies: list[float]  # of each request, from arrival to answer, in s
    ended_at: float  # s, the last answer


def simulate(
    policy: Policy,
    arrivals: Sequence[Arrival],
    cost: Callable[[int], float],
    max_pictures: int,
    few: int | None = None,
    late: int = 0,
) -> Served:
    """Serve arrivals from the first request to the last answer. `cost`: the seconds of a step by its network rows.

    `few` and `late`, as in a worker, with continuous batching only: large requests wait once a step has `few` network
    rows, and `late` pictures may join beyond `max_pictures`, a few at each step.
    Request-level batching answers a request when its whole batch ends, as if the batch were one call.
    """
    arriving = deque(Request(arrival, arrival.pictures, arrival.pictures) for arrival in arrivals)
    everybody, queue = list(arriving), deque[Request]()
    work, ended = list[Picture](), list[Request]()
    now, computed = 0.0, 0  # network rows so far
    while arriving or queue or work:
        if not queue and not work:
            now = max(now, arriving[0].arrival.at)
        while arriving and arriving[0].arrival.at <= now:
            queue.append(arriving.popleft())
        places = room(len(work), max_pictures, late if policy is continuous else 0)
        for request, count in zip(queue, policy(queue, len(work), places), strict=False):
            request.since = computed
            request.to_begin -= count
            work += [Picture(request, request.arrival.steps) for _ in range(count)]
        while queue and not queue[0].to_begin:
            queue.popleft()
        chosen = _next_pictures(work, computed, few) if few is not None and policy is continuous else work
        rows = sum(picture.rows for picture in chosen)
        now, computed = now + cost(rows), computed + rows
        for picture in chosen:
            picture.steps_left -= 1
            if not picture.steps_left:
                picture.request.open -= 1
                if not picture.request.open:
                    ended.append(picture.request)
        work = [picture for picture in work if picture.steps_left]
        if policy is not request_level or not work:
            for request in ended:
                request.answered_at = now
            ended.clear()
    return Served([request.answered_at - request.arrival.at for request in everybody], now)


def _next_pictures(work: list[Picture], computed: int, few: int) -> list[Picture]:
    """Choose the pictures that step next, as a worker does."""
    pictures = ((one.request, Workload(one.rows, one.rows * one.steps_left, one.request.since)) for one in work)
    chosen = set(jobs_to_step(pictures, computed, few))
    return [one for one in work if one.request in chosen]
