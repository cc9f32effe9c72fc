"""Live workers: each announces itself with a key that expires unless it is renewed. Knows nothing of jobs."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from redis import Redis

from service.store import functions, keys
from service.store.connection import best_effort, text

LOADS_COUNT_S = 600  # how long a worker's death while it loaded a model counts
FRESH_S = 1.0  # how long `ReadyWorkers` are taken to be as they were


def announce(connection: Redis, name: str, about: Mapping[str, Any], lease_s: float) -> None:
    """List the worker as live for the next `lease_s`, with what it says about itself."""
    description = json.dumps({**about, "library": functions.LIBRARY})
    functions.call(connection, "announce", name, description, int(lease_s * 1000))


def withdraw(connection: Redis, name: str) -> None:
    """Remove the worker from the list at once."""
    connection.delete(keys.worker(name))
    connection.srem(keys.WORKERS, name)


def is_alive(connection: Redis, name: str) -> bool:
    return bool(connection.exists(keys.worker(name)))


def list_live(connection: Redis) -> list[dict[str, Any]]:
    """Return what each live worker says about itself, draining ones included."""
    return [json.loads(raw) for raw in functions.call(connection, "live_workers")]


def ready(live: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out workers that are shutting down or hang."""
    return [about for about in live if not (about.get("draining") or about.get("stalled"))]


def have_loaded(connection: Redis, digest: str) -> bool:
    """Whether a live worker has the model of this digest; also one that shuts down, and finishes what it has begun."""
    models = (model for about in list_live(connection) for model in about.get("models", ()))
    return any(model["digest"] == digest for model in models)


def died_loading(connection: Redis, digest: str) -> int:
    """Return how many workers have died lately while they loaded the model of this digest."""
    names = connection.smembers(keys.loading(digest))
    return sum(not is_alive(connection, text(name)) for name in names)


def begin_loading(connection: Redis, digest: str, name: str) -> None:
    """Note that a worker loads a model, in case it dies of that; not while Redis is full, which only work empties."""
    with best_effort():
        connection.sadd(keys.loading(digest), name)
        connection.expire(keys.loading(digest), LOADS_COUNT_S)


def end_loading(connection: Redis, digest: str, name: str) -> None:
    connection.srem(keys.loading(digest), name)


class ReadyWorkers:
    """What the workers say that neither shut down nor hang, asked for once a second at most."""

    def __init__(self, redis: functions.Pipeline, clock: Callable[[], float] = time.monotonic) -> None:
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
    """Remove the names of workers whose key has expired, and the libraries of functions that no live one uses."""
    if dead := [name for name in connection.smembers(keys.WORKERS) if not is_alive(connection, text(name))]:
        connection.srem(keys.WORKERS, *dead)
    functions.drop_others(connection, {about.get("library", "") for about in list_live(connection)})
