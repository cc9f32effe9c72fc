"""The RQ worker that the picture worker builds on. Knows nothing of pictures."""

import contextlib
from typing import Any

from redis.exceptions import RedisError
from rq import Queue, SimpleWorker, worker_registration
from rq.exceptions import DequeueTimeout
from rq.job import Job
from rq.serializers import JSONSerializer

from service.telemetry.logs import get_logger

log = get_logger(__name__)

POLL_S = 1  # how long an idle worker waits for a job


class QueueWorker(SimpleWorker):
    """Runs the jobs of one queue, one after the other, in this process.

    RQ's `Worker` forks for each job: a model would be loaded again each time, and CUDA cannot be used after a fork.
    """

    def __init__(self, queue: Queue, name: str, function: str, maintenance_s: int) -> None:
        """`name` must be new: RQ refuses a name that a killed worker still holds. Only `function` is ever run.

        `maintenance_s`: between two runs of RQ's maintenance, which costs twenty commands.
        """
        super().__init__(
            [queue],
            name=name,
            connection=queue.connection,
            serializer=JSONSerializer,
            worker_ttl=20,
            maintenance_interval=maintenance_s,
            log_job_description=False,
        )
        self.function = function

    def bootstrap(self, *arguments: Any, **options: Any) -> None:
        """Register, and heed SIGTERM already while that waits for Redis."""
        self._install_signal_handlers()  # type: ignore[no-untyped-call]
        super().bootstrap(*arguments, **options)

    @property
    def has_work(self) -> bool:
        """Whether `work_between_jobs` has something to do; waiting for a job would delay it."""
        return False

    @property
    def wants_job(self) -> bool:
        """Whether to take the next job from the queue, rather than only to work between jobs."""
        return True

    def work_between_jobs(self) -> None:
        """Called again and again while there is no job."""

    @property
    def dequeue_timeout(self) -> int:
        return POLL_S

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Wait for the next job; None once the worker is to stop, or without one if `timeout` is None.

        RQ's own loop would keep retrying an unreachable Redis after a stop request.
        """
        while not self._stop_requested:
            if self.wants_job:
                wait_s = None if self.has_work else timeout
                with contextlib.suppress(DequeueTimeout):
                    if found := Queue.dequeue_any(self.queues, wait_s, self.connection, serializer=JSONSerializer):
                        if self._is_allowed(found[0]):
                            return found
                        continue
            if timeout is None:
                return None
            self.work_between_jobs()
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()
        return None

    def run_maintenance_tasks(self) -> None:
        """Run RQ's, and register again: Redis may have been emptied, or away for longer than RQ remembers a worker."""
        super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
        self.connection.hset(self.key, mapping=self.serialize())
        worker_registration.register(self)
        self.heartbeat()

    def _is_allowed(self, job: Job) -> bool:
        """Remove a job that is not ours: RQ calls any function that it names, so who writes to Redis could run code."""
        callbacks = (job._success_callback_name, job._failure_callback_name, job._stopped_callback_name)
        if job.func_name == self.function and not any(callbacks):
            return True
        log.error("RQ job removed: it would run another function", rq_job=job.id, function=job.func_name)
        job.delete()
        return False

    def _shutdown(self) -> None:
        """On SIGTERM or Ctrl-C, stop after the current job.

        RQ raises an exception out of the signal handler, which any code that it interrupts may swallow.
        """
        self._stop_requested = True

    def teardown(self) -> None:
        with contextlib.suppress(RedisError):  # without Redis, the worker's registration expires by itself
            super().teardown()  # type: ignore[no-untyped-call]
