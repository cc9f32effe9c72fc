"""A worker's side of results in storage. Storage that fails or hangs loses no job: its pictures then stay in Redis."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from service.contract.kept import KeptJob
from service.contract.records import FinishedPicture
from service.results import files
from service.results.files import ResultFiles
from service.storage_threads import Stalled, StorageThreads
from service.telemetry.logs import get_logger
from shared.storage import Location

log = get_logger(__name__)

WARN_EVERY_S = 10.0

Key = tuple[str, int]  # a picture's job and index


class StorageAway(RuntimeError):
    """Pictures that only storage has cannot be read now."""


@dataclass
class Finished:
    """A job to keep. `files`: those that are not in storage yet, by name."""

    job: KeptJob
    files: dict[str, bytes] = field(default_factory=dict)


class ResultWriter:
    """Writes finished pictures and jobs, and reads pictures for their grid. For one thread."""

    def __init__(self, root: Location, patience_s: float) -> None:
        """`patience_s`: how long a call may take; the worker's whole batch waits for it."""
        self.files, self.threads, self.patience_s = ResultFiles(root), StorageThreads(), patience_s
        self._warned_at = -WARN_EVERY_S

    def keep_pictures(self, finished: Sequence[FinishedPicture], owners: Mapping[str, str]) -> set[Key]:
        """Write pictures whose jobs' owners are known, and return them; none of them if storage fails."""
        kept = [one for one in finished if one.picture.job in owners]
        works = list[Callable[[], None]]()
        for one in kept:
            job_id, index = one.picture.key
            write = partial(self.files.write, owners[job_id], job_id)
            works.append(partial(write, files.picture(index), one.png))
            if one.trajectory is not None:
                works.append(partial(write, files.trajectory(index), one.trajectory))
        return {one.picture.key for one in kept} if self._done(works) else set()

    def keep_jobs(self, finished: Sequence[Finished]) -> set[str]:
        """Write jobs with the files that storage lacks, and return their ids; none of them if storage fails."""
        works = [
            partial(self.files.write, one.job.record.owner, one.job.record.id, name, content)
            for one in finished
            for name, content in one.files.items()
        ]
        records = [partial(self.files.write_job, one.job) for one in finished]
        # A job's record says that all else is there, so it is written last.
        done = self._done(works) and self._done(records)
        return {one.job.record.id for one in finished} if done else set()

    def remove_jobs(self, jobs: Collection[tuple[str, str]]) -> None:
        """Remove jobs, by owner and id, that did not finish after all."""
        self._done([partial(self.files.remove_job, *job) for job in jobs])

    def reopen_jobs(self, jobs: Collection[tuple[str, str]]) -> None:
        """Take back that jobs, given by owner and id, have finished; their pictures stay."""
        self._done([partial(self.files.reopen_job, *job) for job in jobs])

    def read_pictures(self, owner: str, job_id: str, indices: Sequence[int]) -> list[bytes]:
        """Return pictures. StorageAway if storage does not answer, KeyError if it lacks one."""
        works = [partial(self.files.read, owner, job_id, files.picture(index)) for index in indices]
        try:
            found = self.threads.all(works, self.patience_s)
        except (OSError, Stalled) as error:
            raise StorageAway(str(error)) from error
        if missing := [index for index, png in zip(indices, found, strict=True) if png is None]:
            raise KeyError(f"job {job_id} has no pictures {missing}")
        return [png for png in found if png is not None]

    def _done(self, works: Sequence[Callable[[], None]]) -> bool:
        try:
            self.threads.all(works, self.patience_s)
            return True
        except (OSError, Stalled) as error:
            if time.monotonic() - self._warned_at >= WARN_EVERY_S:
                self._warned_at = time.monotonic()
                log.warning("results cannot be kept in storage", storage=str(self.files.root), reason=str(error))
            return False
