"""The live workers, in RQ's registry, and the RQ jobs that wake idle ones. Knows no jobs of clients.

An RQ job tells a worker to sample until nothing is left, for whatever requests. One that is lost costs a second: idle
workers also look by themselves. A worker counts as live until its lease expires, which each heartbeat renews.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from uuid import uuid4

from redis import Redis

from service.store import keys
from service.store.connection import best_effort
from service.store.functions import Pipeline, call

LOADS_COUNT_S = 600  # how long a worker's death while it loaded a model counts
FRESH_S = 1.0  # how long `ReadyWorkers` are taken to be as they were
QUEUE: Final = "labelgrid"  # RQ's, as in `jobs.lua`
TASK: Final = "service.worker.process.sample"  # the one function that workers run, as in `jobs.lua`
ABOUT: Final = "about"  # field of RQ's worker; RQ keeps the others for a minute after its end
# How long RQ keeps a job that ended, and one that failed, as in `jobs.lua`: by default, a year.
RESULT_S, FAILURE_S = 1, 7 * 86_400


def announce(
    connection: Redis, name: str, about: Mapping[str, Any], lease_s: float, fields: Mapping[str, Any] | None = None
) -> bool:
    """List the worker as live for the next `lease_s`, with what it says about itself. Also if Redis is full.

    `fields`: RQ's own. Return whether RQ's workers are suspended.
    """
    pairs = [part for pair in (fields or {}).items() for part in pair]
    return bool(call(connection, "announce", name, json.dumps(about), int(lease_s * 1000), *pairs))


def withdraw(connection: Redis, name: str) -> None:
    """Let the worker count as dead at once."""
    connection.hdel(keys.worker(name), ABOUT)
    connection.delete(keys.old_worker(name))
    connection.srem(keys.OLD_WORKERS, name)


def is_alive(connection: Redis, name: str) -> bool:
    return bool(connection.hexists(keys.worker(name), ABOUT) or connection.exists(keys.old_worker(name)))


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


def wake(connection: Redis) -> None:
    """Wake an idle worker, unless one is about to wake; not while Redis is full or away."""
    with best_effort():
        call(connection, "wake", uuid4().hex)
