"""Wakes idle workers through RQ, and names the model that has new work. Knows no jobs.

A ring that is lost costs a second: workers also look by themselves. An RQ job is only a message here. No worker runs
the function that it names, since whoever can write to Redis could name any.
"""

from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel, ConfigDict
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.exceptions import DequeueTimeout, DuplicateJobError
from rq.serializers import JSONSerializer

from service.store.connection import best_effort, text
from service.telemetry.logs import get_logger

log = get_logger(__name__)

ANSWER: Final = "service.worker.answer_doorbell"  # which workers of the release before this one run
FORGOTTEN_S = 60  # after which a ring counts as lost that a worker died of; RQ's default is a year


class ModelName(BaseModel):
    """A checkpoint with work, as workers must know it to load it."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    is_evaluator: bool = False


class Doorbell:
    """The RQ queue `name`: at most one RQ job for each model."""

    def __init__(self, connection: Redis, name: str) -> None:
        # JSON, because RQ's default unpickles what it reads from Redis.
        self.queue = Queue(name, connection=connection, serializer=JSONSerializer)

    def ring(self, models: Iterable[ModelName]) -> None:
        """Wake a worker for each model, unless one is about to be woken. Does not raise an error of Redis."""
        for model in models:
            try:
                with best_effort():
                    self.queue.enqueue_call(
                        ANSWER,
                        args=(model.model_dump_json(),),
                        job_id=f"labelgrid-{model.digest}",
                        unique=True,
                        timeout=FORGOTTEN_S,
                        result_ttl=0,
                        failure_ttl=FORGOTTEN_S,
                        ttl=FORGOTTEN_S,
                        description=f"labelgrid work for {model.name}",
                    )
            except DuplicateJobError:
                pass
            except RedisError as error:
                log.warning("no worker could be woken", reason=str(error))

    def wait(self, seconds: int) -> ModelName | None:
        """Wait for a ring, and return the model that has work. None if nobody rings."""
        try:
            _, job_id = Queue.lpop([self.queue.key], seconds, self.queue.connection)
        except DequeueTimeout:
            return None
        job = self.queue.fetch_job(text(job_id))
        if job is None:  # it has expired
            return None
        job.delete()
        try:
            return ModelName.model_validate_json(job.args[0])
        except Exception as error:  # of any kind, also of RQ's, since any program may have queued it
            log.error("RQ job removed: it names no model", rq_job=job.id, reason=str(error))
            return None
