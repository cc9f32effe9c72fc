"""What must hold of every job after a soak, by Redis's append-only file and the pictures, and what Redis may keep."""

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from redis import Redis

from faults import checks, history
from faults.checks import Fetched
from faults.trial import fetched
from service.files import PictureFiles
from soak.load import BODIES, Ledger

OF_JOBS = re.compile("labelgrid:(job:[0-9a-f]*(:(waiting|verdicts|events|live|watched))?)")
# What has no time to live: its number is bounded by those of models, workers and queues.
LASTING = re.compile(
    "labelgrid:(workers|ended|models|turns:[0-9a-f]*|waiting:.*|pictures:.*)|rq:(workers|queues|queue|finished|failed|wip|job)(:.*)?"
)


def problems(
    ledger: Ledger, expected: Mapping[int, Fetched], folder: Path, files: PictureFiles
) -> tuple[list[str], Counter[str]]:
    """Check every accepted job. Return all problems, and the number of jobs by status and of pictures."""
    histories = history.read(folder)
    found = [f"job {job_id} exists but was not accepted" for job_id in histories.keys() - ledger.jobs.keys()]
    counts: Counter[str] = Counter()
    for job_id, number in ledger.jobs.items():
        if job_id not in histories:
            found.append(f"job {job_id} was accepted but does not exist")
            continue
        job = histories[job_id]
        ends = {"finished"}
        ends |= {"cancelled"} if job_id in ledger.may_be_cancelled else set()
        ends |= {"failed"} if job_id in ledger.may_be_late else set()
        about = _of_job(job_id, job, number, expected[number], ends, files) + job.late
        found += [f"job {job_id}: {problem}" for problem in about]
        counts[job.states[-1] if job.states else "none"] += 1
        counts["pictures"] += len(job.stored)
    return found, counts


def _of_job(
    job_id: str,
    job: history.History,
    number: int,
    expected: Fetched,
    ends: set[str],
    files: PictureFiles,
) -> list[str]:
    found = checks.check_states(replace(job, deleted=False))  # all jobs expire or are deleted
    total = BODIES[number].total
    if job.states[-1:] == ["finished"]:
        pictures = expected
        with suppress(FileNotFoundError):  # a client has deleted them
            pictures = fetched(files, job_id, total)
        return found + checks.check_pictures(job, total, pictures, expected)
    if job.states and job.states[-1] in ends:
        return found
    return [*found, f"it did not finish: its states were {job.states}"]


def left_over(connection: Redis) -> dict[str, int]:
    """Return the keys of jobs, and those that would stay for ever, by pattern."""
    kinds: Counter[str] = Counter()
    for name in connection.scan_iter(count=1000):
        if OF_JOBS.fullmatch(name) or (connection.ttl(name) == -1 and not LASTING.fullmatch(name)):
            kinds[re.sub("[0-9a-f]{32,}", "*", name)] += 1
    return dict(kinds)
