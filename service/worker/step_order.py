"""Whose pictures take a batch's next step: those of small jobs before those of large ones that would hold them up.

Where a row hardly becomes cheaper in company, as on a CPU, each row of a large job delays everybody in its batch by
what it costs. So it waits while the jobs before it end; not for ever. Knows jobs by what is left of them, no pictures.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

# Chosen by simulation of the mixed requests of `benchmarks/sections/load.py`: higher ones favour large jobs.
HOLDS_UP = 0.5  # of the work left of the jobs before it: a job that has more waits
PATIENCE = 0.2  # of the rows that the batch makes while a job is in it: counted as if they were its own

Job = TypeVar("Job", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Standing:
    """The pictures of one job in a batch, or one of them."""

    now: int  # network rows of their next step
    left: int  # of all of their steps to come
    since: int  # that the batch had made when the last of them joined: a job that is dealt more has not been forgotten


def of_jobs(pictures: Iterable[tuple[Job, Standing]]) -> dict[Job, Standing]:
    """The standing of each job, by those of its pictures."""
    jobs: dict[Job, Standing] = {}
    for job, one in pictures:
        so_far = jobs.get(job, Standing(0, 0, one.since))
        jobs[job] = Standing(so_far.now + one.now, so_far.left + one.left, max(so_far.since, one.since))
    return jobs


def whose_turn(jobs: Mapping[Job, Standing], made: int, few: int) -> list[Job]:
    """The jobs whose pictures step, those with the least work left first (SRPT: Schrage 1968).

    They are taken until `few` network rows have come together, which the device computes nearly as well as many, and
    after that as long as none holds up those before it. `made`: network rows that the batch has made so far.
    """
    order = sorted(jobs, key=lambda job: jobs[job].left - PATIENCE * (made - jobs[job].since))
    chosen: list[Job] = []
    rows = before = 0
    for job in order:
        if rows >= few and jobs[job].left > HOLDS_UP * before:
            break
        chosen.append(job)
        rows, before = rows + jobs[job].now, before + jobs[job].left
    return chosen
