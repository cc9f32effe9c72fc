"""Removes kept jobs that are too old, or more than their owner may keep. Leaves all files that are not of a job."""

import time
from datetime import UTC, datetime

from service.contract.job_ids import HOUR, ID, UNDATED
from service.results.files import ResultFiles
from service.telemetry.logs import get_logger
from shared import storage

log = get_logger(__name__)

DAY_S = 86400


def prune(files: ResultFiles, days: int, bytes_per_owner: int | None, now: float | None = None) -> int:
    """Remove jobs created more than `days` ago, then each owner's oldest beyond the limit. Returns how many folders.

    A job's folder is one, an hour's is one however many jobs it has. `now`: seconds since 1970.
    """
    oldest = datetime.fromtimestamp((now or time.time()) - days * DAY_S, UTC).strftime("%Y-%m-%dT%H")
    removed = 0
    for name in storage.folders(files.root):
        owner = files.root / name
        for hour in storage.folders(owner):
            if HOUR.fullmatch(hour) and hour < oldest:
                storage.remove_folder(owner / hour)
                removed += 1
        if bytes_per_owner is not None:
            removed += _shrink(files, name, bytes_per_owner)
    log.info("kept results pruned", folders=removed)
    return removed


def _shrink(files: ResultFiles, name: str, most: int) -> int:
    """Remove an owner's oldest jobs until the rest has at most this size, and return how many."""
    sizes: dict[tuple[str, str], int] = {}
    for path, size in storage.sizes(files.root / name).items():
        hour, job_id, *_ = [*path.split("/"), ""]
        if (HOUR.fullmatch(hour) or hour == UNDATED) and ID.fullmatch(job_id):
            sizes[hour, job_id] = sizes.get((hour, job_id), 0) + size
    total, removed = sum(sizes.values()), 0
    for hour, job_id in sorted(sizes, key=lambda job: (job[0] != UNDATED, job)):
        if total <= most:
            break
        files.remove_at(files.root / name / hour / job_id)
        total -= sizes[hour, job_id]
        removed += 1
    return removed
