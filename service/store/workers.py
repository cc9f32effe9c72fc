"""Live workers, and how idle ones are woken. Knows no jobs.

A worker announces itself with a key that expires unless it is renewed. RQ wakes idle workers and names the model that
has new work. A ring that is lost costs a second: workers also look by themselves. An RQ job is only a message here, and
its id says all. No worker runs the function that it names, since whoever can write to Redis could name any.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.exceptions import DequeueTimeout, DuplicateJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from service.store import keys
from service.store.connection import best_effort
from service.store.functions import Pipeline, call
from service.telemetry.logs import get_logger

log = get_logger(__name__)

LOADS_COUNT_S = 600  # how long a worker's death while it loaded a model counts
FRESH_S = 1.0  # how long `ReadyWorkers` are taken to be as they were
PREFIX: Final = "labelgrid-"  # of an RQ job's id, before the digest
FORGOTTEN_S = 60  # after which a ring counts as lost that a worker died of; RQ's default is a year


def announce(connection: Redis, name: str, about: Mapping[str, Any], lease_s: float) -> None:
    """List the worker as live for the next `lease_s`, with what it says about itself."""
    call(connection, "announce", name, json.dumps(about), int(lease_s * 1000))


def withdraw(connection: Redis, name: str) -> None:
    """Remove the worker from the list at once."""
    connection.delete(keys.worker(name))
    connection.srem(keys.WORKERS, name)


def is_alive(connection: Redis, name: str) -> bool:
    return bool(connection.exists(keys.worker(name)))


def list_live(connection: Redis) -> list[dict[str, Any]]:
    """Return what each live worker says about itself, draining ones included."""
    return [json.loads(raw) for raw in call(connection, "live_workers")]


def ready(live: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out workers that load their first model, are shutting down or hang."""
    return [about for about in live if not any(about.get(state) for state in ("loading", "draining", "stalled"))]


def have_loaded(connection: Redis, digest: str) -> bool:
    """Whether a live worker has the model of this digest; also one that shuts down, and finishes what it has begun."""
    models = (model for about in list_live(connection) for model in about.get("models", ()))
    return any(model["digest"] == digest for model in models)


def died_loading(connection: Redis, digest: str) -> int:
    """Return how many workers have died lately while they loaded the model of this digest."""
    names = connection.smembers(keys.loading(digest))
    return sum(not is_alive(connection, str(name)) for name in names)


def begin_loading(connection: Redis, digest: str, name: str) -> None:
    """Note that a worker loads a model, in case it dies of that; not while Redis is full, which only work empties."""
    with best_effort():
        connection.sadd(keys.loading(digest), name)
        connection.expire(keys.loading(digest), LOADS_COUNT_S)


def end_loading(connection: Redis, digest: str, name: str) -> None:
    connection.srem(keys.loading(digest), name)


class ReadyWorkers:
    """What the workers say that neither shut down nor hang, asked for once a second at most."""

    def __init__(self, redis: Pipeline, clock: Callable[[], float] = time.monotonic) -> None:
        self.redis, self._clock = redis, clock
        self._asked_at, self._found = clock(), list[dict[str, Any]]()

    async def __call__(self) -> list[dict[str, Any]]:
        """Return what was found within the last second, if it was any worker; else ask."""
        now = self._clock()
        if not self._found or now - self._asked_at >= FRESH_S:
            self._asked_at = now  # first, so that other requests do not ask, too
            self._found = ready(map(json.loads, await self.redis.call("live_workers")))
        return self._found


def forget_dead(connection: Redis) -> None:
    """Remove the names of workers whose key has expired."""
    if dead := [name for name in connection.smembers(keys.WORKERS) if not is_alive(connection, str(name))]:
        connection.srem(keys.WORKERS, *dead)


class Doorbell:
    """The RQ queue `name`: at most one RQ job for each model."""

    def __init__(self, connection: Redis, name: str) -> None:
        # JSON, because RQ's default unpickles what it reads from Redis.
        self.queue = Queue(name, connection=connection, serializer=JSONSerializer)

    def ring(self, digests: Iterable[str]) -> None:
        """Wake a worker for each model, unless one is about to be woken. Does not raise an error of Redis."""
        for digest in digests:
            try:
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
        self.queue.connection.delete(Job.key_for(job_id))
        return str(job_id).removeprefix(PREFIX)
