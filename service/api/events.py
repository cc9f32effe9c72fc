"""A job's progress as server-sent events: what has happened so far, what happens now, and its end.

A job's events are kept in Redis, for clients that connect late or again; the hub says when there are new ones, and has
the previews, which workers publish only while somebody watches. docs/api.md lists the events.
"""

import contextlib
import json
import math
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError

from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.store import keys
from service.store.async_jobs import AsyncJobs
from service.store.forecast import OpenJob

ETA_MOVED_S = 1.0  # by how much a forecast must change to be sent again
WATCHED_MS = 3000  # how long workers render previews after the last renewal
LOOK_AGAIN_S = 1.0  # how often to renew that, to look whether the job still exists, and to show that the stream lives


async def is_complete(jobs: AsyncJobs, job: Job, after: str) -> bool:
    """Return whether the job has ended and has no event after `after`."""
    return job.status in TERMINAL and not await jobs.redis("XRANGE", keys.events(job.id), f"({after}", "+", "COUNT", 1)


def _event(name: str, data: dict[str, Any], entry: str | None = None) -> bytes:
    """Return an event as it is sent. `entry`: its id, after which a client that reconnects goes on."""
    return format_sse_event(event=name, data_str=json.dumps(data), id=entry)


async def job_events(jobs: AsyncJobs, job: Job, after: str) -> AsyncIterator[bytes]:
    """Yield the job's current state and its events after the event `after`, until it ends or a shutdown begins.

    Yields a comment when nothing has happened for a while. Raises RedisError, and ServiceError if the job is gone.
    """
    yield _event("job", job.model_dump(mode="json"))
    watched = "SET", keys.watched(job.id), 1, "PX", WATCHED_MS
    state_of = "HMGET", keys.job(job.id), "status", "owner", "dispatched"
    count = "HLEN", keys.verdicts(job.id)
    status, eta, looked_at = None, job.eta, -math.inf
    with jobs.hub.watch(job.id) as watch:
        while not jobs.hub.stopping:
            if is_due := time.monotonic() - looked_at >= LOOK_AGAIN_S:
                looked_at = time.monotonic()
                with contextlib.suppress(RedisError):  # without the key there are no previews, but all else
                    await jobs.redis(*watched)
                (status, owner, dispatched), done = await jobs.redis.ask(state_of, count)
                if status not in (None, *TERMINAL) and job.options is not None:
                    about = job.id, owner, job.progress.total, int(dispatched), done, job.options.cost
                    found = await jobs.eta(job.digest, OpenJob(*about))
                    if found and (eta is None or _apart_s(eta, found["eta"]) > ETA_MOVED_S):
                        eta = found["eta"]
                        yield _event("eta", found)
            steps = watch.take_previews()  # before events are read, so that no step follows its finished picture
            entries = await jobs.redis("XRANGE", keys.events(job.id), f"({after}", "+")
            for pictures in steps:
                yield _event("steps", {"pictures": json.loads(pictures)})
            for entry, fields in entries:
                after = entry
                yield await _read(jobs, job.id, entry, fields)
                if fields.get("status") in TERMINAL:
                    return
            if is_due:
                yield KEEPALIVE_COMMENT
                if not entries and (status is None or status in TERMINAL):
                    return
            await watch.wait(LOOK_AGAIN_S)


def _apart_s(one: str, other: str) -> float:
    return abs((datetime.fromisoformat(one) - datetime.fromisoformat(other)).total_seconds())


async def _read(jobs: AsyncJobs, job_id: str, entry: str, fields: dict[str, str]) -> bytes:
    """Return the event of one entry, or two if the job's only picture ended it."""
    if "picture" in fields:
        return _picture(job_id, fields["picture"], entry)
    status = fields["status"]
    if status not in TERMINAL:
        return _event("status", {"status": status}, entry)
    end = _event("end", (await jobs.job(job_id)).model_dump(mode="json"), entry)
    last = fields.get("last_picture")
    return end if last is None else _picture(job_id, last) + end


def _picture(job_id: str, index: str, entry: str | None = None) -> bytes:
    return _event("picture", {"index": int(index), "url": f"/jobs/{job_id}/images/{int(index)}.png"}, entry)
