"""A worker's side of results in storage. Storage that fails or hangs loses no job: its pictures then stay in Redis."""

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, TypeVar

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
Work: TypeAlias = Callable[[], None]
K = TypeVar("K", bound=Hashable)


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
        """Write pictures whose jobs' owners are known, and return those that storage has taken."""
        works = list[tuple[Key, Work]]()
        for one in finished:
            job_id, index = one.picture.key
            if job_id in owners:
                write = partial(self.files.write, owners[job_id], job_id)
                works.append((one.picture.key, partial(write, files.picture(index), one.png)))
                if one.trajectory is not None:
                    works.append((one.picture.key, partial(write, files.trajectory(index), one.trajectory)))
        return {key for key, _ in works} - self._failed(works)

    def keep_jobs(self, finished: Sequence[Finished]) -> set[str]:
        """Write jobs with the files that storage lacks, and return the ids of those that it has taken whole."""
        works = [
            (one.job.record.id, partial(self.files.write, one.job.record.owner, one.job.record.id, name, content))
            for one in finished
            for name, content in one.files.items()
        ]
        # A job's record says that all else is there, so it is written last.
        failed = self._failed(works)
        records = [(one.job.record.id, partial(self.files.write_job, one.job)) for one in finished]
        records = [(job_id, write) for job_id, write in records if job_id not in failed]
        return {job_id for job_id, _ in records} - self._failed(records)

    def remove_jobs(self, jobs: Collection[tuple[str, str]]) -> None:
        """Remove jobs, by owner and id, that did not finish after all."""
        self._failed([(job, partial(self.files.remove_job, *job)) for job in jobs])

    def reopen_jobs(self, jobs: Collection[tuple[str, str]]) -> None:
        """Take back that jobs, given by owner and id, have finished; their pictures stay."""
        self._failed([(job, partial(self.files.reopen_job, *job)) for job in jobs])

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

    def _failed(self, works: Sequence[tuple[K, Work]]) -> set[K]:
        """Do works, each for a picture or a job. Return those whose work storage did not take; all if it hangs."""
        try:
            errors = self.threads.all([partial(_error_of, work) for _, work in works], self.patience_s)
        except Stalled as stalled:
            errors = [stalled] * len(works)
        failed = {key for (key, _), error in zip(works, errors, strict=True) if error is not None}
        if failed and time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            reason = str(next(filter(None, errors)))
            log.warning("results cannot be kept in storage", storage=str(self.files.root), reason=reason)
        return failed


def _error_of(work: Work) -> Exception | None:
    """Do the work, and return why storage did not take it."""
    try:
        work()
    except OSError as error:
        return error
    return None
