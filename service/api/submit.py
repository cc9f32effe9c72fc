"""From a checked request to a job, and from the job to the answer that the client prefers (wait or 202, JSON or PNG).

The way of every POST that makes pictures: /generate, /score, /jobs/{id}/retry and /v1/images/generations.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple
from urllib.request import parse_http_list

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from structlog.contextvars import bind_contextvars

from service.api.catalog import Models
from service.api.dependencies import OwnerDep, ServiceDep
from service.api.openapi import PNG, Responses
from service.api.spec import JobSpec, new_record
from service.api.streams import send_png
from service.contract.errors import (
    BadRequest,
    ClientGone,
    JobCancelled,
    JobFailed,
    KeyReuse,
    NoModel,
    NotFailed,
    NotJson,
    NotLearnt,
    NoWorker,
    QueueFull,
    QuotaExceeded,
    TooLarge,
    Unavailable,
)
from service.contract.job_ids import new_job_id
from service.contract.records import TERMINAL, JobKind, JobRecord
from service.contract.schemas import Job, SamplingFields
from service.store.creation import FEW, IdempotentRequest, NoRoom
from service.telemetry import tracing
from service.telemetry.logs import get_logger, request_id
from service.telemetry.metrics import PICTURES_ACCEPTED

log = get_logger(__name__)
UNMEASURED_WAIT_S, MAX_WAIT_S = 10, 3600  # Retry-After of a full queue: before workers have a rate, and at most
STORED_WAIT_S = 3600  # Retry-After for an owner with too many stored pictures: jobs expire by the hour
RESPONSES: Responses = {
    200: {"content": PNG, "description": "The finished job, or with `Accept: image/png` its grid"},
    202: {"model": Job, "description": "The job is accepted and has not ended yet"},
}
# The errors that every route with a Submitter documents.
ERRORS = (
    NotJson, JobCancelled, TooLarge, BadRequest, NotLearnt, KeyReuse, QueueFull, QuotaExceeded, JobFailed, NoModel,
    NoWorker, Unavailable,
)  # fmt: skip


@dataclass(frozen=True)
class Preferences:
    """How the client prefers its answer: how long it waits for it, and whether as PNG."""

    wait_s: float
    png: bool
    applied: str | None  # value of Preference-Applied (RFC 7240)


async def read_preferences(
    service: ServiceDep,
    prefer: Annotated[
        list[str] | None,
        Header(
            description="`respond-async` answers 202 at once, `wait=N` waits at most N seconds",
            examples=[["respond-async"], ["wait=10"]],
        ),
    ] = None,
    accept: Annotated[list[str] | None, Header(include_in_schema=False)] = None,
) -> Preferences:
    """Read the headers. A preference that is not understood is ignored, and so are a preference's parameters, of which
    those understood here have none (RFC 7240). A PNG is for clients that name it, and not JSON, in Accept.
    """
    accepted = ",".join(accept or ()).lower()
    png = "image/png" in accepted and "application/json" not in accepted
    longest_s = service.settings.wait_s
    preferred = [part.partition(";")[0].strip().lower() for part in parse_http_list(",".join(prefer or ()))]
    waits = [match for p in preferred if (match := re.fullmatch(r'wait\s*=\s*"?(\d{1,9})"?', p))]
    if waits:
        wait_s = int(waits[0][1])
        return Preferences(min(wait_s, longest_s), png, f"wait={wait_s}")
    if "respond-async" in preferred:
        return Preferences(0.0, png, "respond-async")
    return Preferences(longest_s, png, None)


PreferencesDep = Annotated[Preferences, Depends(read_preferences)]


class Accepted(NamedTuple):
    """The job of a request. `is_new`: the request created it just now."""

    job_id: str
    is_new: bool


@dataclass(frozen=True)
class Submitter:
    """Creates the job of one request, waits for it, and answers with it."""

    request: Request
    service: ServiceDep
    owner: OwnerDep
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=200,
            description="a retry of the same request with the same key returns the same job",
            examples=["order-1234"],
        ),
    ] = None

    async def submit(
        self,
        kind: JobKind,
        fields: SamplingFields,
        labels: Sequence[Sequence[str]],
        check: Callable[[Models], JobSpec],
        pictures: Sequence[bytes] = (),
    ) -> Accepted:
        """Return the request's job: the one that the same request created before, or a new one.

        Same requests have the same Idempotency-Key, fields, labels and pictures, as JSON or as a form. Models do not
        count: they may be gone on a retry. So `check` is called only for a new job, in a thread unless that is quick.
        """

        def make(models: Models, now: float) -> JobRecord:
            settings, sent = self.service.settings, bool(pictures)
            return new_record(kind, fields, check(models), self.owner, settings, created_at=now, sent=sent)

        def content() -> list[Any]:
            given = fields.model_dump(mode="json", exclude={"labels", "conditions"}, exclude_defaults=True)
            return [kind, labels, given, [hashlib.sha256(png).hexdigest() for png in pictures]]

        return await self._create(content, make, len(labels) <= FEW, pictures)

    async def retry(self, job_id: str) -> Accepted:
        """Return a new job like one that failed or was cancelled, of the same checkpoint.

        Raises NotFailed, UnknownCheckpoint and what `submit` does.
        """
        results = self.service.results
        job, before = await results.job(job_id), await results.jobs.record(job_id)

        def make(models: Models, now: float) -> JobRecord:
            if job.status not in ("failed", "cancelled"):
                detail = f"the job is {job.status}; only a failed or cancelled job can be retried"
                raise NotFailed(detail, job_status=job.status)
            if not before.sent:
                models.with_digest(before.digest, ("path", "job_id"))
            own = {"id": new_job_id(now), "created_at": now, "request_id": request_id()}
            return before.model_copy(update={**own, "traceparent": tracing.traceparent()})

        async with self.service.uploads.of(self.owner) if before.sent else contextlib.nullcontext():
            pictures = await results.uploaded(job_id, before.total) if before.sent else []
            return await self._create(lambda: ["retry", job_id], make, is_quick=True, pictures=pictures)

    async def _create(
        self,
        content: Callable[[], list[Any]],
        make: Callable[[Models, float], JobRecord],
        is_quick: bool,
        pictures: Sequence[bytes],
    ) -> Accepted:
        """Return the job that a request with the same `content` created before, or create one.

        `make` gets the models, and the time by Redis's clock.
        """
        creator, results = self.service.creator, self.service.results
        request, job_id = None, None
        if self.idempotency_key is not None:
            request = IdempotentRequest(self.owner, self.idempotency_key, json.dumps(content(), sort_keys=True))
            job_id = await creator.existing_job(request)
        record = None
        if job_id is None:
            about = await self.service.catalog.models(), await creator.redis.now()
            record = make(*about) if is_quick else await run_in_threadpool(make, *about)
            rate = await self.rate()
            if pictures:
                await results.upload(record.id, pictures)
            try:
                job_id = await creator.create(record, request)
            except NoRoom as error:
                raise _refusal(error, record.total, rate) from None
            finally:
                if pictures and job_id != record.id:
                    await results.remove(record.id)
        tracing.describe({"labelgrid.job_id": job_id})
        if record is None or job_id != record.id:  # the same request created its job first
            bind_contextvars(job_id=job_id)
            return Accepted(job_id, is_new=False)
        PICTURES_ACCEPTED.labels(record.kind).inc(record.total)
        bind_contextvars(job_id=job_id, kind=record.kind, pictures=record.total, model=record.model)
        log.debug("job accepted")
        return Accepted(job_id, is_new=True)

    async def rate(self) -> float:
        """Return the pictures that the workers finish per second; 0 while it is unknown. Raises NoWorker."""
        settings, workers = self.service.settings, self.service.jobs.workers
        ready = await workers()
        if not ready and not settings.accept_without_workers:
            # After the machine stood still, or Redis lost its last writes, a live worker announces itself again
            await asyncio.sleep(settings.heartbeat_s)
            if not (ready := await workers()):
                raise NoWorker("no worker is running; nothing was queued", headers={"Retry-After": "10"})
        return float(sum(about.get("pictures_per_s", 0.0) for about in ready))

    async def wait(self, accepted: Accepted, wait_s: float) -> Job:
        """Return the job once it has ended, or its state after `wait_s`. Raises ClientGone after a disconnect."""
        if wait_s <= 0:
            return await self.service.results.job(accepted.job_id)
        gone = asyncio.create_task(_disconnect(self.request))
        try:
            job = await self.service.jobs.wait(accepted.job_id, wait_s, gone, accepted.is_new)
        finally:
            gone.cancel()
        if gone.done() and job.status not in TERMINAL:
            gone.result()  # raises what else went wrong
            raise ClientGone(ClientGone.example)
        return job

    async def answer(self, accepted: Accepted, preferences: Preferences) -> Response:
        """Wait for the job and answer in the form that the client prefers."""
        job = await self.wait(accepted, preferences.wait_s)
        location = f"/jobs/{job.id}"
        headers = {"Vary": "Accept, Prefer"}
        if preferences.applied:
            headers["Preference-Applied"] = preferences.applied
        has_ended = job.status in TERMINAL
        headers["Content-Location" if has_ended else "Location"] = location
        if has_ended and job.result is None:
            raise why_unfinished(job, headers)
        if has_ended and preferences.png:
            headers["Content-Location"] = f"{location}/grid.png"
            grid = await self.service.results.grid(job, self.owner)
            return send_png(grid, headers)
        return Response(job.model_dump_json(), 200 if has_ended else 202, headers, media_type="application/json")


def why_unfinished(job: Job, headers: Mapping[str, str]) -> JobFailed | JobCancelled:
    """Return the error for a client that waited for the end of a job that failed or was cancelled."""
    location = f"/jobs/{job.id}"
    if job.status == "cancelled":
        return JobCancelled("the job was cancelled while you waited for it", headers=headers, job=location)
    return JobFailed(job.error or "it failed", headers=headers, job=location)


async def _disconnect(request: Request) -> None:
    """Return when the client disconnects. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(full: NoRoom, pictures: int, rate: float) -> QueueFull | QuotaExceeded:
    """Return the error for a job that does not fit. rate: pictures that the workers finish per second, if known."""
    if full.what == "stored":
        detail = f"{full.taken} pictures of yours are stored and {pictures} more would exceed {full.most}"
        headers = {"Retry-After": str(STORED_WAIT_S)}
        return QuotaExceeded(f"{detail}; delete jobs or retry later", headers=headers, stored=full.taken)
    whose = "of yours " if full.what == "owner" else ""
    excess = full.taken + pictures - full.most
    wait_s = math.ceil(min(excess, full.taken) / rate) if rate > 0 else UNMEASURED_WAIT_S
    detail = (
        f"{full.taken} pictures {whose}are waiting and {pictures} more would exceed {full.most}; nothing was queued"
    )
    return QueueFull(detail, headers={"Retry-After": str(min(wait_s, MAX_WAIT_S))}, queued=full.taken)


SubmitterDep = Annotated[Submitter, Depends()]
