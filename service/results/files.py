"""Finished jobs as files: OWNER/HOUR/JOB/ with 0.png, 1.png, ..., strip-0.png, grid.png and job.json, written last.

A job without job.json has not finished, though some of its pictures may be there. All calls may hang;
`storage_threads.py` bounds them. Knows no Redis and no HTTP.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from service.contract.job_ids import ID, UNDATED, hour_of
from service.contract.kept import KeptJob
from service.telemetry.logs import get_logger
from shared import storage
from shared.storage import Location

log = get_logger(__name__)

JOB = "job.json"
GRID = "grid.png"
OWNER = re.compile(r"[0-9a-f]{32}")


def picture(index: int) -> str:
    """Return the name of a picture's file."""
    return f"{index}.png"


def trajectory(index: int) -> str:
    return f"strip-{index}.png"


class ResultFiles:
    """The results in a storage."""

    def __init__(self, root: Location) -> None:
        self.root = root

    def owner(self, name: str) -> Location:
        """Return an owner's folder. Its name is a hash: an owner's name may be anything."""
        return self.root / hashlib.sha256(name.encode()).hexdigest()[:32]

    def job(self, owner: str, job_id: str) -> Location:
        return self.owner(owner) / hour_of(job_id) / job_id

    def write(self, owner: str, job_id: str, name: str, content: bytes) -> None:
        folder = self.owner(owner)
        if isinstance(folder, Path):  # other users of this machine have no business in it
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        storage.write(self.job(owner, job_id) / name, content)

    def write_job(self, kept: KeptJob) -> None:
        self.write(kept.record.owner, kept.record.id, JOB, kept.write().encode())

    def read(self, owner: str, job_id: str, name: str) -> bytes | None:
        """Return a file of a job; None if there is none. OSError if storage fails."""
        if ID.fullmatch(job_id) is None:  # it comes from a request and becomes a path
            return None
        try:
            return storage.read(self.job(owner, job_id) / name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_job(self, owner: str, job_id: str) -> KeptJob | None:
        """Return a finished job; None if there is none, or none that this version can read."""
        raw = self.read(owner, job_id, JOB)
        try:
            return None if raw is None else KeptJob.read(raw)
        except ValueError as error:
            log.warning("kept job cannot be read", job_id=job_id, reason=str(error))
            return None

    def remove_job(self, owner: str, job_id: str) -> None:
        if ID.fullmatch(job_id):
            self.remove_at(self.job(owner, job_id))

    def reopen_job(self, owner: str, job_id: str) -> None:
        """Remove job.json, so that the job has not finished, and leave its pictures."""
        storage.remove(self.job(owner, job_id) / JOB)

    def remove_at(self, folder: Location) -> None:
        storage.remove(folder / JOB)  # first: a job is whole or gone
        storage.remove_folder(folder)

    def job_ids(self, owner: str, before: str = "") -> Iterator[str]:
        """Yield the ids of an owner's jobs, newest first, those before the job `before`. Some may have no job.json."""
        folder = self.owner(owner)
        last = _age(hour_of(before)) if before else None
        for hour in sorted(storage.folders(folder), key=_age, reverse=True):
            if last is None or _age(hour) <= last:
                ids = sorted(filter(ID.fullmatch, storage.folders(folder / hour)), reverse=True)
                yield from (one for one in ids if last is None or (_age(hour), one) < (last, before))


def _age(hour: str) -> tuple[bool, str]:
    """Return what sorts hours, those of jobs without a date first."""
    return hour != UNDATED, hour
