"""When a job will be done: the network rows that come before its end, over the rate of the live workers.

Pending pictures come in the fair queue's turns (`dispatch` in `jobs.lua`). Of those in progress, small jobs step first
(`step_order.py`), and half is taken to be done, since only workers know how far they are. Later requests are not
foreseen, nor attempts after the first. Knows no Redis.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

HALF = 0.5  # of a picture in progress is done
BESIDE = 4  # pictures of other jobs that step beside one of a small job, since a step of few rows would be slow


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
    def rows_in_progress(self) -> float:
        return HALF * max(0, self.dispatched - self.done) * self.cost

    @property
    def rows_pending(self) -> float:
        return self.pending * self.cost


@dataclass(frozen=True)
class Forecast:
    """`ahead`: pending pictures of other jobs whose turn comes before the job's last one."""

    ahead: int
    seconds: float  # until the job is done


class Turns:
    """The pending pictures of one owner, whose jobs take turns."""

    def __init__(self, jobs: Iterable[OpenJob]) -> None:
        ordered = sorted((job for job in jobs if job.pending > 0), key=lambda job: job.pending)
        self._pending = [job.pending for job in ordered]
        self._costs = [*accumulate((job.cost for job in ordered), initial=0.0)]
        self._pictures = [*accumulate(self._pending, initial=0)]
        self._rows = [*accumulate((job.rows_pending for job in ordered), initial=0.0)]

    @property
    def all(self) -> tuple[int, float]:
        """How many pictures and network rows there are."""
        return self._pictures[-1], self._rows[-1]

    def first(self, rounds: int) -> tuple[int, float]:
        """Return how many pictures and network rows the first so many pictures of each job are."""
        whole = bisect.bisect_right(self._pending, rounds)
        pictures = self._pictures[whole] + rounds * (len(self._pending) - whole)
        return pictures, self._rows[whole] + rounds * (self._costs[-1] - self._costs[whole])


class FairQueue:
    """The open jobs of one model at one moment."""

    def __init__(self, jobs: Iterable[OpenJob]) -> None:
        self.jobs = {job.id: job for job in jobs}
        by_owner = dict[str, list[OpenJob]]()
        for job in self.jobs.values():
            by_owner.setdefault(job.owner, []).append(job)
        self._turns = {owner: Turns(own) for owner, own in by_owner.items()}
        self._in_progress = [job for job in self.jobs.values() if job.rows_in_progress]

    def forecast(self, job: OpenJob, rates: Sequence[float]) -> Forecast | None:
        """Return when a job will be done, whether or not it is queued. None if no worker has a rate.

        `rates`: network rows per second of each worker.
        """
        rates = [rate for rate in rates if rate > 0]
        if not rates:
            return None
        own = job.rows_pending + job.rows_in_progress
        ahead, before = self._before(job)
        beside = max(own, BESIDE * job.cost)
        before += sum(min(one.rows_in_progress, beside) for one in self._in_progress if one.id != job.id)
        left = max(1, job.total - job.done)
        own_rate = sum(sorted(rates)[-left:])  # a picture is on one worker only
        return Forecast(ahead, own / own_rate + before / sum(rates))

    def _before(self, job: OpenJob) -> tuple[int, float]:
        """Return how many pending pictures and network rows of other jobs come before the job's last picture.

        In each round every owner gives one picture, of their jobs in turn.
        """
        if job.pending <= 0:
            return 0, 0.0
        pictures, rows = self._turns[job.owner].first(job.pending) if job.owner in self._turns else (0, 0.0)
        if (queued := self.jobs.get(job.id)) is not None:
            own = min(queued.pending, job.pending)
            pictures, rows = pictures - own, rows - own * queued.cost
        rounds = pictures + job.pending
        for owner, turns in self._turns.items():
            if owner != job.owner and (of_owner := turns.all)[0]:
                taken = min(of_owner[0], rounds)
                pictures, rows = pictures + taken, rows + of_owner[1] * taken / of_owner[0]
        return pictures, max(0.0, rows)


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
