"""Wakes idle workers through RQ, and names the model that has new work. Knows no jobs.

A ring that is lost costs a second: workers also look by themselves. An RQ job is only a message here, and its id says
all. No worker runs the function that it names, since whoever can write to Redis could name any.
"""

from collections.abc import Iterable
from typing import Final

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.exceptions import DequeueTimeout, DuplicateJobError
from rq.serializers import JSONSerializer

from service.store.connection import best_effort, text
from service.telemetry.logs import get_logger

log = get_logger(__name__)

PREFIX: Final = "labelgrid-"  # of an RQ job's id, before the digest
FORGOTTEN_S = 60  # after which a ring counts as lost that a worker died of; RQ's default is a year


class Doorbell:
    """The RQ queue `name`: at most one RQ job for each model."""

    def __init__(self, connection: Redis, name: str) -> None:
        # JSON, because RQ's default unpickles what it reads from Redis.
        self.queue = Queue(name, connection=connection, serializer=JSONSerializer)

    def ring(self, digests: Iterable[str]) -> None:
        """Wake a worker for each model, unless one is about to be woken. Does not raise an error of Redis."""
        for digest in digests:
            try:
                with best_effort():
                    self.queue.enqueue_call("labelgrid.work", job_id=PREFIX + digest, unique=True, ttl=FORGOTTEN_S)
            except DuplicateJobError:
                pass
            except RedisError as error:
                log.warning("no worker could be woken", reason=str(error))

    def wait(self, seconds: int) -> str | None:
        """Wait for a ring, and return the digest of the model that has work. None if nobody rings."""
        try:
            _, job_id = Queue.lpop([self.queue.key], seconds, self.queue.connection)
        except DequeueTimeout:
            return None
        if job := self.queue.fetch_job(text(job_id)):  # otherwise it has expired
            job.delete()
        return text(job_id).removeprefix(PREFIX)
