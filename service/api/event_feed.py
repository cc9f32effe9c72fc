"""A job's progress as server-sent events: what has happened so far, what happens now, and its end.

Each client reads on in two streams of its job in Redis: the events, which are kept for clients that connect late or
again, and the previews, which workers write only while somebody watches. What all clients of this process read is asked
for in one message. docs/api.md lists the events.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.store import keys
from service.store.connection import text
from service.store.reader import JobReader

WATCHED_MS = 3000  # how long workers render previews after the last renewal
PAUSE_S = 0.05  # between two looks at the streams
LOOK_AGAIN_S = 1.0  # how often to renew that, to look whether the job still exists, and to show that the stream lives
FROM_START = "0-0"  # the Last-Event-ID of a client that has none
AFTER_ALL = "0-1"  # of a client that has seen the end of a job whose events are gone

Command = tuple[Any, ...]  # of Redis, with its arguments


class Feeds:
    """Asks Redis for all who wait for news here, with one message after each pause."""

    def __init__(self, connection: Redis) -> None:
        self.connection = connection
        self._asked = list[tuple[tuple[Command, ...], asyncio.Future[list[Any]]]]()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, *commands: Command) -> list[Any]:
        """Return the answers to commands, of which some may be errors. Raises RedisError if there are no answers."""
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._asked.append((commands, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())
        return await answer

    async def _send(self) -> None:
        took_s = 0.0
        while self._asked:
            await asyncio.sleep(max(PAUSE_S, 4 * took_s))  # however many wait, others have most of the time
            begun = time.monotonic()
            asked, self._asked = self._asked, []
            pipe = self.connection.pipeline(transaction=False)
            for command in itertools.chain.from_iterable(commands for commands, _ in asked):
                pipe.execute_command(*command)
            try:
                found = iter(await pipe.execute(raise_on_error=False))
            except Exception as error:
                for _, answer in asked:
                    if not answer.done():  # otherwise its client has left
                        answer.set_exception(error)
                continue
            for commands, answer in asked:
                answers = list(itertools.islice(found, len(commands)))
                if not answer.done():
                    answer.set_result(answers)
            took_s = time.monotonic() - begun


async def is_complete(reader: JobReader, job: Job, after: str) -> bool:
    """Return whether the job has ended and has no event after `after`."""
    return job.status in TERMINAL and not await reader.connection.xrange(keys.events(job.id), min=f"({after}", count=1)


def _event(name: str, data: dict[str, Any], entry: str | None = None) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data), id=entry)


async def only_the_end(job: Job) -> AsyncIterator[bytes]:
    """Yield the state of an ended job whose events are gone, and its end.

    The end has an id, so that a browser that reconnects is told that nothing is left.
    """
    data = job.model_dump(mode="json")
    yield _event("job", data)
    yield _event("end", data, AFTER_ALL)


async def job_events(feeds: Feeds, reader: JobReader, job: Job, after: str) -> AsyncIterator[bytes]:
    """Yield the job's current state and its events after the event `after`, until it ends or a shutdown begins.

    Yields a comment when nothing has happened for a while. Raises RedisError, and ServiceError if the job is gone.
    """
    yield _event("job", job.model_dump(mode="json"))
    # Redis answers in this order, so that no step follows its finished picture.
    seen = {keys.previews(job.id): FROM_START, keys.events(job.id): after}
    looked_at = 0.0
    while not reader.stopping:
        commands: list[Command] = [("XREAD", "STREAMS", *seen, *seen.values())]
        if is_due := time.monotonic() - looked_at > LOOK_AGAIN_S:
            looked_at = time.monotonic()
            watch = ("SET", keys.watched(job.id), 1, "PX", WATCHED_MS)
            commands = [watch, ("HGET", keys.job(job.id), "status"), *commands]
        *looked, answer = await feeds.ask(*commands)
        for one in (*looked[1:], answer):  # without the key there are no previews, and events still arrive
            if isinstance(one, RedisError):
                raise one
        for stream, entries in answer:
            for raw, fields in entries:
                entry = seen[text(stream)] = text(raw)
                yield await _as_event(reader, job.id, entry, fields)
                if text(fields.get(b"status", b"")) in TERMINAL:
                    return
        if is_due:
            yield KEEPALIVE_COMMENT
            if not answer and (looked[1] is None or text(looked[1]) in TERMINAL):
                return


async def _as_event(reader: JobReader, job_id: str, entry: str, fields: dict[bytes, bytes]) -> bytes:
    if b"pictures" in fields:
        return _event("steps", {"pictures": json.loads(fields[b"pictures"])})
    if b"picture" in fields:
        return _picture(job_id, fields[b"picture"], entry)
    status = text(fields[b"status"])
    if status not in TERMINAL:
        return _event("status", {"status": status}, entry)
    end = _event("end", (await reader.job(job_id)).model_dump(mode="json"), entry)
    last = fields.get(b"last_picture")  # the job's only picture ended it
    return end if last is None else _picture(job_id, last) + end


def _picture(job_id: str, index: bytes, entry: str | None = None) -> bytes:
    return _event("picture", {"index": int(index), "url": f"/jobs/{job_id}/images/{int(index)}.png"}, entry)
