"""Removes kept jobs that are too old, or more than their owner may keep. Leaves all files that are not of a job."""

import time
from datetime import UTC, datetime

from service.contract.job_ids import HOUR, ID, UNDATED
from service.results.files import JOB, OWNER, ResultFiles
from service.telemetry.logs import get_logger
from shared import storage

log = get_logger(__name__)

DAY_S = 86400


def prune(
    files: ResultFiles, days: int, bytes_per_owner: int | None, open_for_s: float, now: float | None = None
) -> int:
    """Remove jobs created more than `days` ago, then each owner's oldest beyond the limit. Returns how many folders.

    A job's folder is one, an hour's is one however many jobs it has. `open_for_s`: how long a job may take; until then
    the limit does not concern one that has not finished. `now`: seconds since 1970. PermissionError, once all else is
    removed, if some may not be.
    """
    now = time.time() if now is None else now
    oldest, open_since = _hour(now - days * DAY_S), _hour(now - open_for_s)
    removed, refused = 0, None
    for name in filter(OWNER.fullmatch, storage.folders(files.root)):
        try:
            for hour in storage.folders(files.root / name):
                if HOUR.fullmatch(hour) and hour < oldest:
                    storage.remove_folder(files.root / name / hour)
                    removed += 1
            if bytes_per_owner is not None:
                removed += _shrink(files, name, bytes_per_owner, open_since)
        except PermissionError as error:  # such as a copy that another user has restored
            refused = error
    log.info("kept results pruned", folders=removed)
    if refused is not None:
        raise refused
    return removed


def _hour(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H")


def _shrink(files: ResultFiles, name: str, most: int, open_since: str) -> int:
    """Remove an owner's oldest jobs until the rest has at most this size, and return how many.

    Leaves out jobs since the hour `open_since` that have not finished: their grids need their pictures.
    """
    sizes: dict[tuple[str, str], int] = {}
    found = storage.sizes(files.root / name)
    for path, size in found.items():
        hour, job_id, *_ = [*path.split("/"), ""]
        may_be_open = hour != UNDATED and hour >= open_since and f"{hour}/{job_id}/{JOB}" not in found
        if (HOUR.fullmatch(hour) or hour == UNDATED) and ID.fullmatch(job_id) and not may_be_open:
            sizes[hour, job_id] = sizes.get((hour, job_id), 0) + size
    total, removed = sum(sizes.values()), 0
    for hour, job_id in sorted(sizes, key=lambda job: (job[0] != UNDATED, job)):
        if total <= most:
            break
        files.remove_at(files.root / name / hour / job_id)
        total -= sizes[hour, job_id]
        removed += 1
    return removed
