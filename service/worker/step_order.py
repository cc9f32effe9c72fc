"""Decides how many pictures join a batch, and which jobs take part in its next step: small jobs first.

On a CPU batching barely lowers the cost per row, so every row of a large job delays the whole batch. A large job
therefore waits while smaller ones finish, but not forever. Knows jobs by their remaining work, not their pictures.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

# Both come from simulating the mixed requests of `benchmarks/sections/load.py` (docs/dev/decisions.md). Higher values
# favour large jobs.
DELAY_LIMIT = 0.25  # a job waits if it has more work left than this share of the work left of the jobs before it
AGING = 0.2  # share of the rows computed since a job joined that is deducted from its work left
LATE_EACH_STEP = 4  # pictures that may join a full batch before a step

Job = TypeVar("Job", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Workload:
    """What one picture, or one job's pictures in a batch, still has to do; all in network rows."""

    next_step: int
    left: int  # in all remaining steps
    joined_at: int  # rows the batch had computed when the last picture joined: a job that keeps joining does not age


def room(in_progress: int, at_once: int, later: int) -> int:
    """Return how many pictures may join a batch now: up to `at_once`, then `later` more, a few at each step.

    So a small job can join while large ones fill the batch. A few at each step, so that idle workers come first.
    """
    return max(at_once - in_progress, min(LATE_EACH_STEP, at_once + later - in_progress), 0)


def jobs_to_step(pictures: Iterable[tuple[Job, Workload]], computed: int, efficient_rows: int) -> list[Job]:
    """Choose the jobs whose pictures take the next step, least work left first (SRPT: Schrage 1968).

    Jobs are added until the step has `efficient_rows`, the size from which larger calls gain little, and beyond it
    as long as none delays those before it. `computed`: network rows that the batch has computed so far.
    """
    jobs: dict[Job, Workload] = {}
    for job, one in pictures:
        sum_ = jobs.get(job, Workload(0, 0, one.joined_at))
        jobs[job] = Workload(sum_.next_step + one.next_step, sum_.left + one.left, max(sum_.joined_at, one.joined_at))
    order = sorted(jobs, key=lambda job: jobs[job].left - AGING * (computed - jobs[job].joined_at))
    chosen: list[Job] = []
    rows = before = 0
    for job in order:
        if rows >= efficient_rows and jobs[job].left > DELAY_LIMIT * before:
            break
        chosen.append(job)
        rows, before = rows + jobs[job].next_step, before + jobs[job].left
    return chosen
