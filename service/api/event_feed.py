"""A job's way as server-sent events: what happened so far, what happens now, and its end.

Reads two streams of Redis: `events`, kept for those who come later or again, and `live`, which workers write only while
somebody watches. A job is read once, however many watch it here. docs/jobs.md lists the events.
"""

import asyncio
import contextlib
import functools
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.store.connection import best_effort, text
from service.store.jobs import KEPT_EVENTS
from service.store.keys import events_key, previews_key, watched_key
from service.store.reader import JobReader

WATCHED_MS = 3000  # a watch not renewed for this long is over: workers make previews no longer
EVENT_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
LOOK_AGAIN_MS = 1000  # how often a feed where nothing happens looks whether the job is still there
KEPT_STEPS = 4  # as in Redis: only the newest are of use, but several workers may share a job

Place = tuple[int, int]  # an entry's id in Redis, which orders them


async def is_told(reader: JobReader, job: Job, after: str) -> bool:
    """Whether the job has ended and nothing of it is left to tell after event `after`."""
    return job.status in TERMINAL and not await reader.connection.xrange(events_key(job.id), min=f"({after}", count=1)


@dataclass(frozen=True)
class Told:
    """One event. `id`: to go on after it."""

    name: str
    data: dict[str, Any]
    id: str | None = None

    @functools.cached_property
    def as_sent(self) -> bytes:
        """As server-sent event, written once for all who watch."""
        return format_sse_event(event=self.name, data_str=json.dumps(self.data), id=self.id)


class Feed:
    """What happens to one job, read by one task for all who watch it here."""

    def __init__(self, reader: JobReader, job_id: str) -> None:
        self.reader, self.job_id = reader, job_id
        self.watchers = 0
        self.tick = asyncio.Event()  # set, and made anew, when Redis answered: there is news, or there was none
        self._events = deque[tuple[Place, Told]](maxlen=KEPT_EVENTS)
        self._steps = deque[tuple[Place, Told]](maxlen=KEPT_STEPS)
        self.task = asyncio.create_task(self._read())
        self.task.add_done_callback(lambda task: self._tick())

    def since(self, steps: Place, event: Place) -> list[tuple[Place, Told]]:
        """What came after these places, in an order in which no step is told after its picture."""
        return [
            entry for told, after in ((self._steps, steps), (self._events, event)) for entry in told if entry[0] > after
        ]

    def _tick(self) -> None:
        self.tick.set()
        self.tick = asyncio.Event()

    async def _read(self) -> None:
        """Until the job's end, or until nobody watches it. Previews are made as long as this goes on."""
        events, live, connection = events_key(self.job_id), previews_key(self.job_id), self.reader.connection
        seen: dict[Any, Any] = {live: "0-0", events: "0-0"}  # Redis answers in this order
        over = False
        while self.watchers:
            with best_effort():  # there are no previews then
                await connection.set(watched_key(self.job_id), 1, px=WATCHED_MS)
            answer: Any = await (connection.xread(seen) if over else self.reader.read_streams(seen, LOOK_AGAIN_MS))
            for stream, entries in answer or []:
                for raw, fields in entries:
                    entry = seen[text(stream)] = text(raw)
                    told = await self._told(fields, entry)
                    (self._steps if told.id is None else self._events).append((_place(entry), told))
                    if told.name == "end":
                        return
            if not answer:
                if over:
                    return
                # It may have ended since that read: what it told then is still to be read.
                over = await self.reader.status(self.job_id) in (None, *TERMINAL)
            self._tick()

    async def _told(self, fields: dict[bytes, bytes], entry: str) -> Told:
        if b"pictures" in fields:
            return Told("steps", {"pictures": json.loads(fields[b"pictures"])})
        if b"picture" in fields:
            index = int(fields[b"picture"])
            return Told("picture", {"index": index, "url": f"/jobs/{self.job_id}/images/{index}.png"}, entry)
        status = text(fields[b"status"])
        if status in TERMINAL:
            return _whole("end", await self.reader.job(self.job_id), entry)
        return Told("status", {"status": status}, entry)


class Feeds:
    """The jobs that are watched here."""

    def __init__(self, reader: JobReader) -> None:
        self.reader = reader
        self.open: dict[str, Feed] = {}

    async def close(self) -> None:
        """Nothing is read any more."""
        for task in (tasks := [feed.task for feed in self.open.values()]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def happenings(self, job_id: str, after: str) -> AsyncGenerator[Told | None]:
        """What happens to a job after the event `after` ("0-0": all), until its end, or the end of a shutdown.

        None: nothing happened for a while. RedisError.
        """
        steps, event = (0, 0), _place(after)
        with self._watch(job_id) as feed:
            while not self.reader.deadline_passed:
                over, tick, news = feed.task.done(), feed.tick, feed.since(steps, event)
                for place, told in news:
                    if told.id is None:
                        steps = place
                    else:
                        event = place
                    yield told
                if over:
                    feed.task.result()  # raises what ended it before its time
                    return
                if not news:
                    yield None
                await tick.wait()

    @contextlib.contextmanager
    def _watch(self, job_id: str) -> Iterator[Feed]:
        feed = self.open.get(job_id)
        if feed is None or feed.task.done():
            feed = self.open[job_id] = Feed(self.reader, job_id)
            feed.task.add_done_callback(functools.partial(self._drop, feed))
        feed.watchers += 1
        try:
            yield feed
        finally:
            feed.watchers -= 1

    def _drop(self, feed: Feed, task: asyncio.Task[None]) -> None:
        if self.open.get(feed.job_id) is feed:  # else there is a new one
            del self.open[feed.job_id]


def _place(entry: str) -> Place:
    ms, _, number = entry.partition("-")
    return int(ms), int(number)


def _whole(event: str, job: Job, entry: str | None = None) -> Told:
    return Told(event, job.model_dump(mode="json"), entry)


async def job_events(feeds: Feeds, job: Job, after: str) -> AsyncIterator[bytes]:
    """The job as it stands and what happens to it after the event `after`, as server-sent events.

    They end as soon as a shutdown begins: the client resumes them elsewhere.
    """
    yield _whole("job", job).as_sent
    async with contextlib.aclosing(feeds.happenings(job.id, after)) as happenings:
        async for told in happenings:
            if feeds.reader.stopping:
                return
            yield KEEPALIVE_COMMENT if told is None else told.as_sent
