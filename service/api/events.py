"""A job's progress as server-sent events: what has happened so far, what happens now, and its end.

A job's events are kept in Redis, for clients that connect late or again; the hub says when there are new ones, and has
the previews, which workers publish only while somebody watches. docs/api.md lists the events.
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError

from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.store import keys
from service.store.connection import text
from service.store.reader import JobReader

WATCHED_MS = 3000  # how long workers render previews after the last renewal
LOOK_AGAIN_S = 1.0  # how often to renew that, to look whether the job still exists, and to show that the stream lives
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # of a stream: nothing on the way may hold it back
FROM_START = "0-0"  # the Last-Event-ID of a client that has none
AFTER_ALL = "0-1"  # of a client that has seen the end of a job whose events are gone


async def is_complete(reader: JobReader, job: Job, after: str) -> bool:
    """Return whether the job has ended and has no event after `after`."""
    return job.status in TERMINAL and not await reader.redis(
        "XRANGE", keys.events(job.id), f"({after}", "+", "COUNT", 1
    )


class JobEvent(NamedTuple):
    """An event of a job. `entry`: its id, after which a client that reconnects goes on."""

    name: str
    data: dict[str, Any]
    entry: str | None = None


async def as_stream(events: AsyncIterator[JobEvent | None]) -> AsyncIterator[bytes]:
    """Write events as server-sent ones, and None as a comment, which shows that the stream lives."""
    async for event in events:
        if event is None:
            yield KEEPALIVE_COMMENT
        else:
            yield format_sse_event(event=event.name, data_str=json.dumps(event.data), id=event.entry)


async def only_the_end(job: Job) -> AsyncIterator[JobEvent]:
    """Yield the state of an ended job whose events are gone, and its end.

    The end has an id, so that a browser that reconnects is told that nothing is left.
    """
    data = job.model_dump(mode="json")
    yield JobEvent("job", data)
    yield JobEvent("end", data, AFTER_ALL)


async def job_events(reader: JobReader, job: Job, after: str) -> AsyncIterator[JobEvent | None]:
    """Yield the job's current state and its events after the event `after`, until it ends or a shutdown begins.

    Yields None when nothing has happened for a while. Raises RedisError, and ServiceError if the job is gone.
    """
    yield JobEvent("job", job.model_dump(mode="json"))
    watch_key, status_of = ("SET", keys.watched(job.id), 1, "PX", WATCHED_MS), ("HGET", keys.job(job.id), "status")
    looked_at = 0.0
    with reader.hub.watch(job.id) as watch:
        while not reader.hub.stopping:
            if is_due := time.monotonic() - looked_at >= LOOK_AGAIN_S:
                looked_at = time.monotonic()
            steps = watch.take_previews()  # before events are read, so that no step follows its finished picture
            new = ("XRANGE", keys.events(job.id), f"({after}", "+")
            *looked, entries = await reader.redis.ask(*((watch_key, status_of, new) if is_due else (new,)))
            for one in (*looked[1:], entries):  # without the key there are no previews, and events still arrive
                if isinstance(one, RedisError):
                    raise one
            for pictures in steps:
                yield JobEvent("steps", {"pictures": json.loads(pictures)})
            for raw, fields in entries:
                after = text(raw)
                for event in await _read(reader, job.id, after, fields):
                    yield event
                if text(fields.get(b"status", b"")) in TERMINAL:
                    return
            if is_due:
                yield None
                if not entries and (looked[1] is None or text(looked[1]) in TERMINAL):
                    return
            await watch.wait(LOOK_AGAIN_S)


async def _read(reader: JobReader, job_id: str, entry: str, fields: dict[bytes, bytes]) -> list[JobEvent]:
    """Return the events of one entry: two if the job's only picture ended it."""
    if b"picture" in fields:
        return [_picture(job_id, fields[b"picture"], entry)]
    status = text(fields[b"status"])
    if status not in TERMINAL:
        return [JobEvent("status", {"status": status}, entry)]
    end = JobEvent("end", (await reader.job(job_id)).model_dump(mode="json"), entry)
    last = fields.get(b"last_picture")
    return [end] if last is None else [_picture(job_id, last), end]


def _picture(job_id: str, index: bytes, entry: str | None = None) -> JobEvent:
    return JobEvent("picture", {"index": int(index), "url": f"/jobs/{job_id}/images/{int(index)}.png"}, entry)
