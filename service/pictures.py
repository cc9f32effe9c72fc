"""Pictures, grids, trajectories and uploads as files; Redis holds everything else of a job.

HOUR/JOB/ has 0.png, 1.png, ..., trajectory-0.png and grid.png. The hour is that of the job's creation, so that old ones
are found without reading anything. All calls may hang; `storage_threads.py` bounds them. Knows no Redis and no HTTP.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from service.contract.records import HOUR, hour_of
from service.telemetry.logs import get_logger
from shared import storage
from shared.storage import Location

log = get_logger(__name__)

GRID: Final = "grid.png"
HOUR_S = 3600


def picture(index: int) -> str:
    """Return the name of a picture's file, which is also that of an uploaded picture."""
    return f"{index}.png"


def trajectory(index: int) -> str:
    return f"trajectory-{index}.png"


class PictureFiles:
    """The files of all jobs in one storage. Errors are OSErrors."""

    def __init__(self, root: Location) -> None:
        self.root = root

    def folder(self, job_id: str) -> Location:
        return self.root / hour_of(job_id) / job_id

    def write(self, job_id: str, name: str, content: bytes) -> None:
        if isinstance(self.root, Path):  # other users of this machine have no business in it
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        storage.write(self.folder(job_id) / name, content)

    def read(self, job_id: str, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return a file of a job, or its bytes from `start` to `end`. FileNotFoundError if there is none."""
        return storage.read(self.folder(job_id) / name, start, end)

    def size(self, job_id: str, name: str) -> int:
        """Return how many bytes a file of a job has. FileNotFoundError if there is none."""
        return storage.size(self.folder(job_id) / name)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job."""
        storage.remove_folder(self.folder(job_id))

    def remove_older(self, created_before: float) -> int:
        """Remove the files of all jobs of hours that ended before this time (Unix seconds). Returns how many hours.

        Leaves what is not ours, and what may not be removed, such as a copy that another user has restored.
        """
        oldest = datetime.fromtimestamp(created_before - HOUR_S, UTC).strftime("%Y-%m-%dT%H")
        removed = 0
        for hour in storage.folders(self.root):
            if HOUR.fullmatch(hour) and hour < oldest:
                try:
                    storage.remove_folder(self.root / hour)
                    removed += 1
                except PermissionError as error:
                    log.warning("old pictures cannot be removed", reason=str(error))
        return removed
