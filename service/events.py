"""A job's way as server-sent events: what happened so far, what happens now, and its end.

Reads two streams of Redis: `events`, kept for those who come later or again, and `live`, which workers write only while
somebody watches. docs/jobs.md lists the events.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from service.jobs import events_key, live_key, text, watched_key
from service.records import TERMINAL
from service.views import JobReader

WATCHED_MS = 3000  # a watch not renewed for this long is over: workers make previews no longer
EVENT_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
LOOK_AGAIN_MS = 1000  # how often a quiet stream looks whether its client and the job are still there


async def is_told(reader: JobReader, job_id: str, after: str) -> bool:
    """Whether the job has ended and nothing of it is left to tell after event `after`. UnknownJob, ExpiredJob."""
    if (await reader.job(job_id)).status not in TERMINAL:
        return False
    return not await reader.connection.xrange(events_key(job_id), min=f"({after}", count=1)


@dataclass(frozen=True)
class Told:
    """One event. `id`: to go on after it."""

    name: str
    data: dict[str, Any]
    id: str | None = None


async def happenings(
    reader: JobReader, job_id: str, after: str, gone: Callable[[], Awaitable[bool]]
) -> AsyncIterator[Told | None]:
    """What happens to a job after the event `after` ("0-0": all), until its end, `gone()`, or the end of a shutdown.

    None: nothing happened for a while.
    Previews are made as long as somebody asks here.
    """
    events, live = events_key(job_id), live_key(job_id)
    # Redis answers in this order, so that no step is told after its picture.
    seen: dict[Any, Any] = {live: "0-0", events: after}
    yield await _whole(reader, job_id, "job")
    while not reader.left and not await gone():
        await reader.connection.set(watched_key(job_id), 1, px=WATCHED_MS)
        answer: Any = await reader.connection.xread(seen, block=LOOK_AGAIN_MS)
        for stream, entries in answer or []:
            for raw, fields in entries:
                entry = seen[text(stream)] = text(raw)
                if b"pictures" in fields:
                    yield Told("steps", {"pictures": json.loads(fields[b"pictures"])})
                elif b"picture" in fields:
                    index = int(fields[b"picture"])
                    yield Told("picture", {"index": index, "url": f"/jobs/{job_id}/images/{index}.png"}, entry)
                elif (status := text(fields[b"status"])) in TERMINAL:
                    yield await _whole(reader, job_id, "end", entry)
                    return
                else:
                    yield Told("status", {"status": status}, entry)
        if not answer:
            if (await reader.status(job_id)) in (None, *TERMINAL):
                return
            yield None


async def _whole(reader: JobReader, job_id: str, event: str, entry: str | None = None) -> Told:
    return Told(event, (await reader.job(job_id)).model_dump(mode="json"), entry)


async def job_events(
    reader: JobReader, job_id: str, after: str, gone: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    """`happenings` as server-sent events. They end as soon as a shutdown begins: the client resumes them elsewhere."""

    async def over() -> bool:
        return reader.stopping or await gone()

    async for told in happenings(reader, job_id, after, over):
        if told is None:
            yield KEEPALIVE_COMMENT
        else:
            yield format_sse_event(event=told.name, data_str=json.dumps(told.data), id=told.id)
