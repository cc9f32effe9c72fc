"""What must hold of every job after a soak, by Redis's append-only file and the pictures, and what Redis may keep."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from redis import Redis

from faults import checks, history
from faults.checks import Fetched
from service import pictures
from service.contract.records import TERMINAL
from service.pictures import PictureFiles
from service.store.connection import text
from soak.load import BODIES, Ledger

JOB = re.compile(rb"labelgrid:job:([0-9a-f]{32})(?::(verdicts))?")
OF_JOBS = re.compile("labelgrid:(job:[0-9a-f]*(:(waiting|verdicts|events|live|watched))?)")
# What has no time to live: its number is bounded by those of models, workers and queues.
LASTING = re.compile(
    "labelgrid:(workers|ended|models|turns:[0-9a-f]*|waiting:.*|pictures:.*)|rq:(workers|queues)(:.*)?"
)


@dataclass
class Stored:
    """What was written of a job when it should not have been, and whether the job is gone."""

    problems: list[str] = field(default_factory=list)
    status: str = ""
    is_gone: bool = False


def stored(log: Iterable[list[bytes]]) -> dict[str, Stored]:
    """Return what the commands of an append-only file stored, by job."""
    found: dict[str, Stored] = defaultdict(Stored)
    for name, *arguments in log:
        name = name.upper()
        for key in arguments[: None if name in (b"DEL", b"UNLINK") else 1]:
            if matched := JOB.fullmatch(key):
                _note(found[matched[1].decode()], name, (matched[2] or b"").decode(), arguments[1:])
    return found


def _note(job: Stored, name: bytes, part: str, arguments: list[bytes]) -> None:
    if name in (b"DEL", b"UNLINK"):
        job.is_gone |= part == ""
        return
    if name not in (b"HSET", b"HMSET", b"HSETNX"):
        return
    pairs = {key.decode(): value for key, value in zip(arguments[::2], arguments[1::2], strict=True)}
    if job.is_gone:
        job.problems.append(f"{part or 'its record'} was written after it was deleted or had expired")
    if part == "verdicts" and job.status in TERMINAL:
        job.problems.append(f"pictures {sorted(pairs)} were stored after its end")
    elif part == "":
        job.status = pairs.get("status", job.status.encode()).decode()


def read(folder: Path) -> tuple[dict[str, history.History], dict[str, Stored]]:
    """Return every job's history and what was stored of it."""
    log = b"".join(path.read_bytes() for path in history.files(folder))
    return history.histories(log), stored(history.applied(log))


def problems(
    ledger: Ledger, expected: Mapping[int, Fetched], folder: Path, files: PictureFiles
) -> tuple[list[str], Counter[str]]:
    """Check every accepted job. Return all problems, and the number of jobs by status and of pictures."""
    histories, everything = read(folder)
    found = [f"job {job_id} exists but was not accepted" for job_id in histories.keys() - ledger.jobs.keys()]
    counts: Counter[str] = Counter()
    for job_id, number in ledger.jobs.items():
        if job_id not in histories:
            found.append(f"job {job_id} was accepted but does not exist")
            continue
        job, kept = histories[job_id], everything[job_id]
        may_be_cancelled = job_id in ledger.may_be_cancelled
        about = _of_job(job_id, job, number, expected[number], may_be_cancelled, files) + kept.problems
        found += [f"job {job_id}: {problem}" for problem in about]
        counts[job.states[-1] if job.states else "none"] += 1
        counts["pictures"] += len(job.stored)
    return found, counts


def _of_job(
    job_id: str,
    job: history.History,
    number: int,
    expected: Fetched,
    may_be_cancelled: bool,
    files: PictureFiles,
) -> list[str]:
    found = checks.check_states(replace(job, deleted=False))  # all jobs expire or are deleted
    total = BODIES[number].total
    if job.states[-1:] == ["finished"]:
        return found + checks.check_pictures(job, total, _fetched(files, job_id, total) or expected, expected)
    if job.states[-1:] == ["cancelled"] and may_be_cancelled:
        return found
    return [*found, f"it did not finish: its states were {job.states}"]


def _fetched(files: PictureFiles, job_id: str, total: int) -> Fetched | None:
    """Return a job's pictures; None if a client has deleted them."""
    try:
        found = [files.read(job_id, pictures.picture(index)) for index in range(total)]
        return Fetched(found, files.read(job_id, pictures.GRID) if total > 1 else found[0])
    except FileNotFoundError:
        return None


def left_over(connection: Redis) -> dict[str, int]:
    """Return the keys of jobs, and those that would stay for ever, by pattern."""
    kinds: Counter[str] = Counter()
    for raw in connection.scan_iter(count=1000):
        name = text(raw)
        if OF_JOBS.fullmatch(name) or (connection.ttl(raw) == -1 and not LASTING.fullmatch(name)):
            kinds[re.sub("[0-9a-f]{32,}", "*", name)] += 1
    return dict(kinds)
