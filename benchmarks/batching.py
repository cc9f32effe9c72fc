"""Batching policies under random load: Poisson arrivals, three policies on one stepping loop, a real or virtual clock.

Knows no network: a stepper advances rows. `CostStepper` only advances a virtual clock by a step's measured cost, so
that thousands of requests take seconds.
"""

import bisect
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from service.worker.step_order import Workload, by_job, jobs_to_step, room
from shared.options import SamplingOptions, network_rows

SIZES = range(1, 9)  # pictures of a request
STEPS = (4, 8, 12, 16)
GUIDANCE = (1.0, 3.0)


@dataclass(frozen=True)
class Arrival:
    """A request: its time of arrival, in s, and its options."""

    at: float
    pictures: int
    options: SamplingOptions

    @property
    def network_rows(self) -> int:
        return self.pictures * network_rows(self.options.guidance) * self.options.steps


def poisson(rate: float, count: int, seed: int, steps: Sequence[int] = STEPS) -> list[Arrival]:
    """Draw `count` requests of mixed sizes, steps and guidance that arrive at `rate` per second on average, from 0 on.

    Their options depend on the seed only: at another rate the same requests arrive, closer together or farther apart.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(size=count)
    wants = [
        (int(rng.choice(SIZES)), SamplingOptions(steps=int(rng.choice(steps)), guidance=float(rng.choice(GUIDANCE))))
        for _ in range(count)
    ]
    return [Arrival(at / rate, *want) for at, want in zip(np.cumsum(gaps).tolist(), wants, strict=True)]


def within(span_s: float, rate: float, seed: int) -> list[Arrival]:
    """Draw the requests of about `span_s` seconds, three at least."""
    return poisson(rate, max(3, round(rate * span_s)), seed)


def mean_network_rows(steps: Sequence[int] = STEPS) -> float:
    """Return the average number of network rows of a request."""
    rows = [network_rows(w) for w in GUIDANCE]
    return float(np.mean(SIZES) * np.mean(steps) * np.mean(rows))


class RowStepper(Protocol):
    def new_row(self, labels: Any, options: SamplingOptions, seed: int) -> Any: ...

    def step(self, rows: Sequence[Any]) -> None: ...


class Clock(Protocol):
    def now(self) -> float: ...

    def wait_until(self, at: float) -> None: ...


class RealClock:
    """Seconds since it was created."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def wait_until(self, at: float) -> None:
        time.sleep(max(0.0, at - self.now()))


@dataclass
class VirtualClock:
    time_s: float = 0.0

    def now(self) -> float:
        return self.time_s

    def wait_until(self, at: float) -> None:
        self.time_s = max(self.time_s, at)


@dataclass
class CostRow:
    options: SamplingOptions
    step: int = 0

    @property
    def done(self) -> bool:
        return self.step == self.options.steps


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


class CostStepper:
    """Advances rows and a virtual clock, without a network."""

    def __init__(self, clock: VirtualClock, cost: Callable[[int], float]) -> None:
        self.clock, self.cost = clock, cost

    def new_row(self, labels: Any, options: SamplingOptions, seed: int) -> CostRow:
        return CostRow(options)

    def step(self, rows: Sequence[CostRow]) -> None:
        self.clock.time_s += self.cost(sum(network_rows(row.options.guidance) for row in rows))
        for row in rows:
            row.step += 1


@dataclass
class Waiting:
    """A request being served."""

    arrival: Arrival
    to_begin: int  # pictures that have not begun
    open: int  # pictures that are not finished
    since: int = 0  # network rows computed before its last picture began
    answered_at: float = 0.0


# A policy decides how many pictures of each queued request begin now:
# (queue, pictures in progress, room) -> a number for each request from the front of the queue on.
Policy = Callable[[Sequence[Waiting], int, int], list[int]]


def continuous(queue: Sequence[Waiting], in_progress: int, room: int) -> list[int]:
    """Continuous batching: pictures join at any step if there is room."""
    return _fill(queue, room, whole=False)


def request_level(queue: Sequence[Waiting], in_progress: int, room: int) -> list[int]:
    """Request-level batching: whole requests form a batch, which runs to its end. The first always fits."""
    return [] if in_progress else _fill(queue, room, whole=True)


def eight_requests(queue: Sequence[Waiting], in_progress: int, room: int) -> list[int]:
    """Request-level batching as in `baselines/litserve_server.py`: eight requests, of however many pictures."""
    return [] if in_progress else [waiting.to_begin for waiting in queue[:8]]


def one_at_a_time(queue: Sequence[Waiting], in_progress: int, room: int) -> list[int]:
    """No batching: one picture after the other."""
    return [] if in_progress else [1]


ANSWERS_TOGETHER = (request_level, eight_requests)


def _fill(queue: Sequence[Waiting], room: int, *, whole: bool) -> list[int]:
    taken: list[int] = []
    for waiting in queue:
        wanted = waiting.to_begin
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
    pictures: int


def serve(
    policy: Policy,
    arrivals: Sequence[Arrival],
    stepper: RowStepper,
    clock: Clock,
    *,
    max_pictures: int,
    few: int | None = None,
    late: int = 0,
    labels: Any = None,
) -> Served:
    """Serve arrivals from the first request to the last answer.

    `few` and `late`, as in a worker, with continuous batching only: large requests wait once a step has `few` network
    rows, and `late` pictures may join beyond `max_pictures`, a few at each step.
    Request-level batching answers a request when its whole batch ends, as if the batch were one call.
    """
    arriving, queue = deque(Waiting(a, a.pictures, a.pictures) for a in arrivals), deque[Waiting]()
    everybody, work, ended = list(arriving), list[tuple[Waiting, Any]](), list[Waiting]()
    seed = computed = 0  # network rows so far
    while arriving or queue or work:
        if not queue and not work:
            clock.wait_until(arriving[0].arrival.at)
        while arriving and arriving[0].arrival.at <= clock.now():
            queue.append(arriving.popleft())
        if queue:
            places = room(len(work), max_pictures, late if policy is continuous else 0)
            for waiting, count in zip(list(queue), policy(list(queue), len(work), places), strict=False):
                if count:
                    waiting.since = computed
                for _ in range(count):
                    work.append((waiting, stepper.new_row(labels, waiting.arrival.options, seed)))
                    seed += 1
                waiting.to_begin -= count
            while queue and not queue[0].to_begin:
                queue.popleft()
        if not work:
            continue
        chosen = _next_rows(work, computed, few) if few is not None and policy is continuous else work
        stepper.step([row for _, row in chosen])
        computed += sum(network_rows(row.options.guidance) for _, row in chosen)
        for waiting, row in chosen:
            if row.done:
                waiting.open -= 1
                if waiting.open == 0:
                    ended.append(waiting)
        work = [(waiting, row) for waiting, row in work if not row.done]
        if policy not in ANSWERS_TOGETHER or not work:
            for waiting in ended:
                waiting.answered_at = clock.now()
            ended.clear()
    latencies = [waiting.answered_at - waiting.arrival.at for waiting in everybody]
    return Served(latencies, clock.now(), sum(a.pictures for a in arrivals))


def _next_rows(work: list[tuple[Waiting, Any]], computed: int, few: int) -> list[tuple[Waiting, Any]]:
    """Choose the rows of `work` that step next, as a worker does."""

    def workload(waiting: Waiting, row: Any) -> Workload:
        rows = network_rows(row.options.guidance)
        return Workload(rows, rows * (row.options.steps - row.step), waiting.since)

    jobs = by_job((id(waiting), workload(waiting, row)) for waiting, row in work)
    chosen = set(jobs_to_step(jobs, computed, few))
    return [(waiting, row) for waiting, row in work if id(waiting) in chosen]


def simulate(
    policy: Policy,
    arrivals: Sequence[Arrival],
    cost: Callable[[int], float],
    max_pictures: int,
    few: int | None = None,
    late: int = 0,
) -> Served:
    """Serve arrivals on a virtual clock, by the measured cost of steps."""
    clock = VirtualClock()
    return serve(policy, arrivals, CostStepper(clock, cost), clock, max_pictures=max_pictures, few=few, late=late)


def fewest_late(arrivals: Sequence[Arrival], row_s: float, within_s: float) -> int:
    """Return how many answers take longer than `within_s` in the best schedule, where a row of work takes `row_s`.

    First come, first served of those that are not late is best where all may take equally long, even for who knows all
    arrivals and may interrupt: where one would be late, that one is given up that delays the last most (Kise et al.
    1978).
    """
    on_time: list[Arrival] = []
    for arrival in arrivals:
        on_time.append(arrival)
        if _end_of(on_time, row_s) > arrival.at + within_s:
            rest = [on_time[:i] + on_time[i + 1 :] for i in range(len(on_time))]
            on_time = min(rest, key=lambda kept: _end_of(kept, row_s))
    return len(arrivals) - len(on_time)


def _end_of(arrivals: Sequence[Arrival], row_s: float) -> float:
    now = 0.0
    for one in arrivals:
        now = max(now, one.at) + one.network_rows * row_s
    return now


def least_p95(runs: Sequence[Sequence[Arrival]], row_s: float) -> float:
    """Return the smallest p95 of all latencies that any schedule reaches, in s: no policy can have less."""
    may_be_late = sum(map(len, runs)) // 20
    low, high = 0.0, max(_end_of(run, row_s) for run in runs)
    while high - low > 0.001:
        middle = (low + high) / 2
        if sum(fewest_late(run, row_s, middle) for run in runs) <= may_be_late:
            high = middle
        else:
            low = middle
    return high
