"""When a job will be done: the network rows that come before its end, over the rate of the live workers.

Pending pictures come in the fair queue's turns (`dispatch` in `jobs.lua`). Of the pictures that workers have, those of
smaller jobs step first (`step_order.py`), and half of each is taken to be done, since only workers know how far they
are. Larger jobs come before in two cases: workers have no room for more pictures, or a step would have too few rows.
Later requests are not foreseen, nor attempts after the first. docs/performance.md says how far off forecasts are. Knows
no Redis.
"""

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

HALF = 0.5  # of a picture in progress is done
STEPPING = 10  # pictures that step together, of larger jobs if the job itself has fewer


@dataclass(frozen=True)
class OpenJob:
    """An open job: its pictures, how many are dispatched and finished, and the cost of one, in network rows."""

    id: str
    owner: str
    total: int
    dispatched: int
    done: int
    cost: float

    @property
    def pending(self) -> int:
        return self.total - self.dispatched

    @property
    def in_progress(self) -> int:
        return max(0, self.dispatched - self.done)

    @property
    def rows_in_progress(self) -> float:
        return HALF * self.in_progress * self.cost

    @property
    def rows_pending(self) -> float:
        return self.pending * self.cost

    @property
    def rows(self) -> float:
        """Network rows that are left to compute."""
        return self.rows_pending + self.rows_in_progress

    @property
    def size(self) -> int:
        """Tells smaller jobs from larger ones: `rows` is from 2^(size - 1) to 2^size."""
        return math.frexp(self.rows)[1]


@dataclass(frozen=True)
class Forecast:
    """`ahead`: pending pictures of other jobs whose turn comes before the job's last one."""

    ahead: int
    seconds: float  # until the job is done


@dataclass(frozen=True)
class WorkerSpeed:
    """Network rows a second, and how many pictures a worker has at most. A free one takes half as many at once."""

    rows_per_s: float
    max_pictures: int


class Turns:
    """The pending pictures of one owner's jobs of one size, which take turns."""

    def __init__(self, jobs: Iterable[OpenJob]) -> None:
        ordered = sorted(jobs, key=lambda job: job.pending)
        self._pending = [job.pending for job in ordered]
        self._costs = [*accumulate((job.cost for job in ordered), initial=0.0)]
        self._pictures = [*accumulate(self._pending, initial=0)]
        self._rows = [*accumulate((job.rows_pending for job in ordered), initial=0.0)]

    @property
    def pending(self) -> tuple[int, float]:
        """How many pictures and network rows are pending."""
        return self._pictures[-1], self._rows[-1]

    def first(self, rounds: int) -> tuple[int, float]:
        """Return how many pictures and network rows the first so many pending pictures of each job are."""
        whole = bisect.bisect_right(self._pending, rounds)
        pictures = self._pictures[whole] + rounds * (len(self._pending) - whole)
        return pictures, self._rows[whole] + rounds * (self._costs[-1] - self._costs[whole])


class FairQueue:
    """The open jobs of one model at one moment."""

    def __init__(self, jobs: Iterable[OpenJob]) -> None:
        self.jobs = {job.id: job for job in jobs}
        by_owner = dict[str, dict[int, list[OpenJob]]]()
        for job in self.jobs.values():
            by_owner.setdefault(job.owner, {}).setdefault(job.size, []).append(job)
        self._turns = {owner: {size: Turns(own) for size, own in sizes.items()} for owner, sizes in by_owner.items()}
        self._in_progress = dict[int, tuple[float, float]]()  # pictures and network rows, by the size of their job
        for job in self.jobs.values():
            pictures, rows = self._in_progress.get(job.size, (0, 0.0))
            self._in_progress[job.size] = pictures + job.in_progress, rows + job.rows_in_progress

    def forecast(self, job: OpenJob, workers: Iterable[WorkerSpeed]) -> Forecast | None:
        """Return when a job will be done, whether or not it is queued. None if no worker has a rate."""
        fastest = sorted((one for one in workers if one.rows_per_s > 0), key=lambda one: -one.rows_per_s)
        if not fastest:
            return None
        if not (left := job.pending + job.in_progress):  # all is drawn, and its grid comes next
            return Forecast(0, 0.0)
        ahead, others = self._others(job)
        before = sum(rows for size, (_, rows) in others.items() if size <= job.size)
        larger = [(pictures, rows) for size, (pictures, rows) in sorted(others.items()) if size > job.size and pictures]
        n_larger = sum(pictures for pictures, _ in larger)
        beside = min(sum(rows for _, rows in larger), max(0, min(n_larger, STEPPING - left)) * job.cost)
        excess = n_larger + left - sum(one.max_pictures for one in fastest)
        for_room = 0.0  # rows of larger jobs that end before a worker has room for the job's last picture
        for pictures, rows in larger if job.pending else ():
            for_room += rows * min(1.0, max(0.0, excess / pictures))
            excess -= pictures
        before += max(beside, for_room)
        own = fastest[: math.ceil(2 * left / fastest[0].max_pictures)]
        return Forecast(ahead, job.rows / _rate(own) + before / _rate(fastest))

    def _others(self, job: OpenJob) -> tuple[int, dict[int, tuple[float, float]]]:
        """Return how many pending pictures of other jobs come before the job's last one.

        Also return pictures and network rows of them and of those in progress, by the size of their job. In each round
        every owner gives one picture, of their jobs in turn.
        """
        queued = self.jobs.get(job.id)
        found, ahead = dict(self._in_progress), 0

        def add(size: int, pictures: float, rows: float) -> None:
            before = found.get(size, (0.0, 0.0))
            found[size] = max(0.0, before[0] + pictures), max(0.0, before[1] + rows)

        for size, turns in self._turns.get(job.owner, {}).items():
            pictures, rows = turns.first(job.pending)
            ahead += pictures
            add(size, pictures, rows)
        if queued is not None:
            own = min(queued.pending, job.pending)
            ahead -= own
            add(queued.size, -own - queued.in_progress, -own * queued.cost - queued.rows_in_progress)
        rounds = ahead + job.pending
        for owner, sizes in self._turns.items():
            pending = sum(turns.pending[0] for turns in sizes.values())
            if owner != job.owner and pending:
                taken = min(pending, rounds)
                ahead += taken
                for size, turns in sizes.items():
                    add(size, *(taken / pending * one for one in turns.pending))
        return ahead, found


def _rate(workers: Iterable[WorkerSpeed]) -> float:
    return sum(one.rows_per_s for one in workers)


class Rate:
    """Network rows a second of work, mostly of the last HALF_LIFE_S of work. Idle time does not count."""

    HALF_LIFE_S = 30.0

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0

    def add(self, rows: float, seconds: float) -> None:
        kept = 0.5 ** (seconds / self.HALF_LIFE_S)
        self._rows, self._seconds = kept * self._rows + rows, kept * self._seconds + seconds

    @property
    def per_s(self) -> float:
        """0 before the first work."""
        return self._rows / self._seconds if self._seconds else 0.0
