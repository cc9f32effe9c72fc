"""A finished job as JSON in storage, which may be read years later. Knows no files.

As in Redis, a reader ignores fields that it does not know. A field that is added needs a default.
"""

from service.contract.records import JobRecord, JobResult, Verdict
from service.contract.stored import Stored


class KeptJob(Stored):
    """A finished job as it is kept in storage, beside its pictures."""

    record: JobRecord
    started_at: float | None
    finished_at: float
    result: JobResult
    verdicts: tuple[Verdict, ...]  # of all its pictures, by index

    @property
    def grid(self) -> int | None:
        """The index of the only picture, which then is the grid; None if the grid has a file of its own."""
        shown = self.result.best_indices(self.record)
        return shown[0] if len(shown) == 1 and not self.record.sent else None
