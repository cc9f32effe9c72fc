"""What an RQ worker of the service runs: one function, whatever an RQ job names. `process.py` has the worker.

Whoever can write to Redis can name any function, as the job's own or as a callback, and any address as a webhook.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rq import get_current_job
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.utils import as_text

from service.store.workers import FAILURE_S, TASK

OLD_RING = "labelgrid.work"  # what APIs of the release before this one enqueue
READ = {"created_at", "data", "description", "enqueued_at", "origin", "started_at", "status", "worker_name"}


def sample() -> None:
    """Sample until nothing is left to do, in the worker that runs this."""
    task = get_current_job()
    if not isinstance(task, Task):
        raise RuntimeError("only service.worker.process.Worker can run this")
    task.work()


class Task(Job):
    """An RQ job that runs `sample`, or fails. `work`: of its worker."""

    work: Callable[[], None]

    @classmethod
    def fetch(cls, *which: Any, **more: Any) -> Job:
        """Read a job from Redis. NoSuchJobError also if it cannot be read: of any other, RQ's worker would end."""
        try:
            return super().fetch(*which, **more)
        except (ValueError, TypeError, AttributeError) as error:
            raise NoSuchJobError(f"an RQ job cannot be read: {error}") from error

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Take over the known fields. Others name functions, addresses and other jobs."""
        super().restore({name: value for name, value in raw_data.items() if as_text(name) in READ})
        self.timeout, self.failure_ttl = -1, FAILURE_S

    def perform(self) -> None:
        """Run `sample`. PermissionError if the job names another function or has arguments."""
        if self.func_name not in (TASK, OLD_RING) or self.instance or self.args or self.kwargs:
            raise PermissionError(f"workers run {TASK} only, without arguments")
        self.func_name = TASK
        super().perform()
