"""A job's progress as server-sent events: what has happened so far, what happens now, and its end.

Reads two Redis streams: the events, which are kept for clients that connect late or again, and the previews, which
workers write only while somebody watches. Reads each job once, however many clients watch it here. docs/api.md lists
the events.
"""

import asyncio
import contextlib
import functools
import itertools
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.store import keys
from service.store.connection import best_effort, text
from service.store.jobs import KEPT_EVENTS
from service.store.reader import JobReader

WATCHED_MS = 3000  # how long workers render previews after the last renewal
LOOK_AGAIN_MS = 1000  # how often a feed without news checks whether the job still exists
KEPT_STEPS = 4  # as in Redis: only the newest matter, but several workers may share a job
FROM_START = "0-0"  # the Last-Event-ID of a client that has none
AFTER_ALL = "0-1"  # of a client that has seen the end of a job whose events are gone


async def is_complete(reader: JobReader, job: Job, after: str) -> bool:
    """Return whether the job has ended and has no event after `after`."""
    return job.status in TERMINAL and not await reader.connection.xrange(keys.events(job.id), min=f"({after}", count=1)


@dataclass(frozen=True)
class Event:
    """One event. A client resumes after its `id`. `steps` events, and a picture that ended its job, have none."""

    name: str
    data: dict[str, Any]
    id: str | None = None
    number: int = 0  # in the order of arrival here

    @functools.cached_property
    def encoded(self) -> bytes:
        """The server-sent event, encoded once for all clients."""
        return format_sse_event(event=self.name, data_str=json.dumps(self.data), id=self.id)


class Feed:
    """The events of one job, for all clients that watch it here."""

    task: asyncio.Task[None]  # reads the events

    def __init__(self, reader: JobReader, job_id: str) -> None:
        self.reader, self.job_id = reader, job_id
        self.watchers = 0
        self.tick = asyncio.Event()  # set, and replaced, after each answer from Redis, with news or without
        self._numbers = itertools.count(1)
        self._events = deque[Event](maxlen=KEPT_EVENTS)
        self._steps = deque[Event](maxlen=KEPT_STEPS)

    def since(self, number: int) -> list[Event]:
        """Return the events after this number."""
        news = [event for event in (*self._steps, *self._events) if event.number > number]
        return sorted(news, key=lambda event: event.number)

    async def read(self) -> None:
        """Read until the job ends or nobody watches it, and keep the previews coming meanwhile."""
        events, previews, connection = keys.events(self.job_id), keys.previews(self.job_id), self.reader.connection
        # Redis answers in this order, so that no step follows its finished picture.
        seen: dict[Any, Any] = {previews: "0-0", events: "0-0"}
        has_ended = False
        while self.watchers:
            with best_effort():  # without this key there are no previews, and events still arrive
                await connection.set(keys.watched(self.job_id), 1, px=WATCHED_MS)
            answer: Any = await (connection.xread(seen) if has_ended else self.reader.read_streams(seen, LOOK_AGAIN_MS))
            for stream, entries in answer or []:
                for raw, fields in entries:
                    entry = seen[text(stream)] = text(raw)
                    for event in await self._events_of(fields, entry):
                        (self._steps if event.name == "steps" else self._events).append(event)
                        if event.name == "end":
                            return
            if not answer:
                if has_ended:
                    return
                # The job may have ended since that read, so its last events are read once more.
                has_ended = await self.reader.status(self.job_id) in (None, *TERMINAL)
            self.tick.set()
            self.tick = asyncio.Event()

    async def _events_of(self, fields: dict[bytes, bytes], entry: str) -> list[Event]:
        number = next(self._numbers)
        if b"pictures" in fields:
            return [Event("steps", {"pictures": json.loads(fields[b"pictures"])}, None, number)]
        if b"picture" in fields:
            return [Event("picture", self._picture(fields[b"picture"]), entry, number)]
        status = text(fields[b"status"])
        if status not in TERMINAL:
            return [Event("status", {"status": status}, entry, number)]
        job = await self.reader.job(self.job_id)
        events = list[Event]()
        if (last := fields.get(b"last_picture")) is not None:  # the job's only picture ended it
            events.append(Event("picture", self._picture(last), None, number))
        return [*events, Event("end", job.model_dump(mode="json"), entry, next(self._numbers))]

    def _picture(self, index: bytes) -> dict[str, Any]:
        return {"index": int(index), "url": f"/jobs/{self.job_id}/images/{int(index)}.png"}


class Feeds:
    """The feeds of the jobs that clients watch here."""

    def __init__(self, reader: JobReader) -> None:
        self.reader = reader
        self.open: dict[str, Feed] = {}

    async def close(self) -> None:
        """Stop reading."""
        for task in (tasks := [feed.task for feed in self.open.values()]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def follow(self, job_id: str, after: str) -> AsyncGenerator[Event | None]:
        """Yield the job's events after the event `after` ("0-0": all), until it ends or a shutdown begins.

        Yields None when nothing has happened for a while. Raises RedisError.
        """
        seen = 0
        with self._watch(job_id) as feed:
            while not self.reader.stopping:
                is_last, tick, news = feed.task.done(), feed.tick, feed.since(seen)
                for event in news:
                    seen = event.number
                    if event.id is None or _position(event.id) > _position(after):
                        yield event
                if is_last:
                    feed.task.result()  # raises what stopped the feed
                    return
                if not news:
                    yield None
                await tick.wait()

    @contextlib.contextmanager
    def _watch(self, job_id: str) -> Iterator[Feed]:
        feed = self.open.get(job_id)
        if feed is None:
            feed = self.open[job_id] = Feed(self.reader, job_id)
            feed.task = asyncio.create_task(self._read(feed))
        feed.watchers += 1
        try:
            yield feed
        finally:
            feed.watchers -= 1

    async def _read(self, feed: Feed) -> None:
        try:
            await feed.read()
        finally:
            del self.open[feed.job_id]
            feed.tick.set()


def _position(entry: str) -> tuple[int, ...]:
    """Return the id of a stream's entry as numbers, which order the entries."""
    return tuple(map(int, entry.split("-")))


async def only_the_end(job: Job) -> AsyncIterator[bytes]:
    """Yield the state of an ended job whose events are gone, and its end.

    The end has an id, so that a browser that reconnects is told that nothing is left.
    """
    data = job.model_dump(mode="json")
    yield Event("job", data).encoded
    yield Event("end", data, AFTER_ALL).encoded


async def job_events(feeds: Feeds, job: Job, after: str) -> AsyncIterator[bytes]:
    """Yield the job's current state and its events after the event `after`, as server-sent events.

    A shutdown ends the stream: the client resumes it at another process.
    """
    yield Event("job", job.model_dump(mode="json")).encoded
    async with contextlib.aclosing(feeds.follow(job.id, after)) as events:
        async for event in events:
            yield KEEPALIVE_COMMENT if event is None else event.encoded
