"""From a job to the answer that the client prefers: waited for or 202, JSON or PNG."""

import asyncio
import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.request import parse_http_list

from fastapi import Request, Response
from opentelemetry.trace import get_current_span
from starlette.datastructures import Headers
from structlog.contextvars import bind_contextvars

from service.api.dependencies import IDEMPOTENCY_KEY, Caller, Service
from service.api.openapi import PNG, Responses
from service.contract.errors import ClientGone, DeadlineExceeded, JobCancelled, JobFailed, NotReady
from service.contract.records import TERMINAL
from service.contract.schemas import Job

RESPONSES: Responses = {
    200: {"content": PNG, "description": "The finished job, or with `Accept: image/png` its grid"},
    202: {"model": Job, "description": "The job is accepted and has not ended yet"},
}
HEADERS: Final[dict[str, Any]] = {  # of every request that creates a job and waits for it
    "parameters": [
        IDEMPOTENCY_KEY,
        {
            "name": "Prefer",
            "in": "header",
            "description": "`respond-async` answers 202 at once, `wait=N` waits at most N seconds",
            "schema": {"type": "string", "examples": ["respond-async", "wait=10"]},
        },
    ]
}


@dataclass(frozen=True)
class Preferences:
    """How the client prefers its answer: how long it waits for it, and whether as PNG."""

    wait_s: float
    png: bool
    applied: str | None  # value of Preference-Applied (RFC 7240)


def read_preferences(headers: Headers, longest_s: float) -> Preferences:
    """Read the headers. A preference that is not understood is ignored, and so are a preference's parameters, of which
    those understood here have none (RFC 7240). A PNG is for clients that name it, and not JSON, in Accept.
    """
    accepted = ",".join(headers.getlist("accept")).lower()
    png = "image/png" in accepted and "application/json" not in accepted
    prefer = ",".join(headers.getlist("prefer"))
    preferred = [part.partition(";")[0].strip().lower() for part in parse_http_list(prefer)]
    waits = [match for p in preferred if (match := re.fullmatch(r'wait\s*=\s*"?(\d{1,9})"?', p))]
    if waits:
        wait_s = int(waits[0][1])
        return Preferences(min(wait_s, longest_s), png, f"wait={wait_s}")
    if "respond-async" in preferred:
        return Preferences(0.0, png, "respond-async")
    return Preferences(longest_s, png, None)


async def answer(caller: Caller, job_id: str) -> Response:
    """Wait for the job and answer in the form that the client prefers."""
    service = caller.service
    preferences = read_preferences(caller.request.headers, service.settings.wait_s)
    await wait(caller, job_id, preferences.wait_s)
    location = f"/jobs/{job_id}"
    headers = {"Vary": "Accept, Prefer"}
    if preferences.applied:
        headers["Preference-Applied"] = preferences.applied
    if preferences.png:
        with contextlib.suppress(NotReady):  # also if it has ended without a grid
            return await service.results.send_grid(
                job_id, caller.owner, {**headers, "Content-Location": f"{location}/grid.png"}
            )
    job = await service.jobs.job(job_id)
    has_ended = job.status in TERMINAL
    headers["Content-Location" if has_ended else "Location"] = location
    if not has_ended:
        headers |= await retry_after(service, job)
    if has_ended and job.result is None:
        raise why_unfinished(job, headers)
    return Response(job.model_dump_json(), 200 if has_ended else 202, headers, media_type="application/json")


async def wait(caller: Caller, job_id: str, wait_s: float) -> None:
    """Return once the job has ended, or after `wait_s`. Raises ClientGone after a disconnect.

    The request's log line and span name the job.
    """
    get_current_span().set_attributes({"labelgrid.job_id": job_id})
    bind_contextvars(job_id=job_id)
    if wait_s <= 0:
        return
    gone = asyncio.create_task(_disconnect(caller.request))
    try:
        has_ended = await caller.service.jobs.wait(job_id, wait_s, gone)
    finally:
        gone.cancel()
    if gone.done() and not has_ended:
        gone.result()  # raises what else went wrong
        raise ClientGone(ClientGone.example)


async def retry_after(service: Service, job: Job) -> dict[str, str]:
    """Return the header that says in how many seconds an open job will be done; none if that is not known."""
    if job.eta is None:
        return {}
    left_s = datetime.fromisoformat(job.eta).timestamp() - await service.jobs.redis.now()
    return {"Retry-After": str(max(1, math.ceil(left_s)))}


def why_unfinished(job: Job, headers: Mapping[str, str]) -> JobFailed | JobCancelled | DeadlineExceeded:
    """Return the error for a client that waited for the end of a job that failed or was cancelled."""
    location = f"/jobs/{job.id}"
    if job.status == "cancelled":
        return JobCancelled("the job was cancelled while you waited for it", headers=headers, job=location)
    if job.reason == "deadline":
        return DeadlineExceeded(job.error or DeadlineExceeded.title, headers=headers, job=location)
    return JobFailed(job.error or "it failed", headers=headers, job=location)


async def _disconnect(request: Request) -> None:
    """Return when the client disconnects. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
