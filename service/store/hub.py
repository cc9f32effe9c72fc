"""What waits for a job: one pub/sub connection a process hears of all changes. Knows no HTTP.

The functions that move jobs publish their ids (`jobs.lua`), workers publish previews. A message may be lost, so those
who wait also look at their jobs now and then, and all of them do after a reconnection.
"""

import asyncio
import contextlib
import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from service.store import keys
from service.store.connection import SILENT_S
from service.telemetry.boundary import confined

KEPT = 4  # previews for a slow client: only the newest matter, but several workers may share a job
EXPECTED = 1000  # new jobs that nobody watches yet: most are watched at once, the others never
RECONNECT_S = 1.0
PING_AFTER_S = SILENT_S  # without a message; twice as long, and the connection is dead


@dataclass(eq=False)
class Watch:
    """One that waits for news of a job.

    `is_new`: the hub has listened since before the job's creation. `previews`: JSON, newest last.
    """

    has_ended: bool = False
    is_new: bool = False
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    previews: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT))

    def take_previews(self) -> list[str]:
        taken = list(self.previews)
        self.previews.clear()
        return taken

    async def wait(self, timeout_s: float) -> None:
        """Return at the next news, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.heard.wait()
        self.heard.clear()


class Hub:
    """Wakes those who watch jobs. `connection`: of its pool, of which it takes one connection."""

    def __init__(self, connection: Redis) -> None:
        self.connection = connection
        self.stopping = False  # the server is shutting down
        self.deadline = math.inf  # when, in monotonic seconds, waiting clients must have their answer
        self._watches = defaultdict[str, set[Watch]](set)  # by job
        self._expected = dict[str, bool]()  # new job -> whether it has ended already
        self._task: asyncio.Task[None] | None = None
        self._began_at = -math.inf

    def start(self) -> None:
        """Connect. Again, if it is not the first time: after a failover the address may lead to another server."""
        if time.monotonic() - self._began_at > RECONNECT_S:
            self._began_at = time.monotonic()
            if self._task is not None:
                self._task.cancel()
            self._task = asyncio.create_task(self._listen())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def stop(self, within_s: float) -> None:
        """Begin the shutdown: resumable streams end now, and every wait ends within this time."""
        self.stopping, self.deadline = True, time.monotonic() + within_s
        self._wake_all()

    def expect(self, job_id: str) -> None:
        """Listen for the end of a job before it is created: one who then watches it need not look at it first."""
        self._expected[job_id] = False
        if len(self._expected) > EXPECTED:
            del self._expected[next(iter(self._expected))]

    @contextlib.contextmanager
    def watch(self, job_id: str) -> Iterator[Watch]:
        """Return what hears of a job's changes from now on."""
        is_new = job_id in self._expected
        watch = Watch(self._expected.pop(job_id, False), is_new)
        self._watches[job_id].add(watch)
        try:
            yield watch
        finally:
            self._watches[job_id].remove(watch)
            if not self._watches[job_id]:
                del self._watches[job_id]

    async def _listen(self) -> None:
        while True:
            # Those who wait see for themselves whether Redis is away.
            with confined("periodic task", task="hearing of jobs"), contextlib.suppress(RedisError):
                async with self.connection.pubsub() as messages:
                    await messages.subscribe(keys.CHANGES, keys.PREVIEWS)
                    await self._hear_all(messages)
            await asyncio.sleep(RECONNECT_S)

    async def _hear_all(self, messages: PubSub) -> None:
        """Hear messages until the connection is lost, or silent also after a ping."""
        pinged = False
        while True:
            message = await messages.get_message(timeout=PING_AFTER_S)
            if message is not None:
                pinged = False
                self._hear(message)
            elif pinged:
                await self.connection.connection_pool.disconnect(inuse_connections=False)
                return
            else:
                pinged = True
                await messages.ping()

    def _hear(self, message: dict[str, Any]) -> None:
        """Wake whom a message concerns. One that cannot be read concerns nobody."""
        with confined("message"):
            if message["type"] == "pong":
                return
            if message["type"] != "message":  # subscribed, perhaps again
                self._wake_all()
            elif message["channel"] == keys.PREVIEWS:
                job_id, _, previews = message["data"].partition(" ")
                for watch in self._watches.get(job_id, ()):
                    watch.previews.append(previews)
                    watch.heard.set()
            else:
                for job_id, has_ended in json.loads(message["data"]).items():
                    if job_id in self._expected:
                        self._expected[job_id] = has_ended
                    for watch in self._watches.get(job_id, ()):
                        watch.has_ended = watch.has_ended or has_ended
                        watch.heard.set()

    def _wake_all(self) -> None:
        self._expected.clear()
        for watches in self._watches.values():
            for watch in watches:
                watch.heard.set()
