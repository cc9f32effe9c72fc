"""From a checked request to a job, and from the job to the answer that the client prefers (wait or 202, JSON or PNG).

Shared by POST /generate, POST /score and /v1/images/generations.
"""

import asyncio
import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from structlog.contextvars import bind_contextvars

from service.api.catalog import Catalog, Models
from service.api.dependencies import OwnerDep
from service.api.downloads.reader import ResultReader
from service.api.jobs.preferences import Preferences
from service.api.jobs.spec import JobSpec, new_record
from service.api.openapi import PNG, Responses
from service.api.slots import Slots
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
from service.settings import Settings
from service.store.admission import Full, NoRoom
from service.store.creation import FEW, JobCreator, NewJob
from service.store.idempotency import IdempotentRequest
from service.store.jobs import JobStore
from service.store.workers import ReadyWorkers
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


class Accepted(NamedTuple):
    """The job of a request. `is_new`: the request created it just now."""

    job_id: str
    is_new: bool


Prepare = Callable[[Models, float], JobRecord]  # given the time by Redis's clock


@dataclass(frozen=True)
class Submitter:
    """Creates the job of one request, waits for it, and answers with it.

    uploads: held by a request with uploaded pictures until they are in Redis. A small zip may unpack to a lot, so few
    of them are in memory at the same time.
    """

    request: Request
    settings: Settings
    store: JobStore
    creator: JobCreator
    workers: ReadyWorkers
    results: ResultReader
    catalog: Catalog
    uploads: Slots
    owner: str
    idempotency_key: str | None

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

        def content() -> list[Any]:
            given = fields.model_dump(mode="json", exclude={"labels", "conditions"}, exclude_defaults=True)
            return [kind, labels, given, [hashlib.sha256(png).hexdigest() for png in pictures]]

        def prepare(models: Models, now: float) -> JobRecord:
            spec = check(models)
            if not pictures:
                spec.check_learnt()
            return new_record(kind, fields, spec, self.owner, self.settings, created_at=now, sent=bool(pictures))

        is_quick = len(labels) <= FEW and fields.webhook is None  # whose host's address is looked up
        return await self._create(content, prepare, is_quick, pictures)

    async def retry(self, job_id: str) -> Accepted:
        """Return a new job like one that failed or was cancelled, of the same checkpoint.

        Raises NotFailed, UnknownCheckpoint and what `submit` does.
        """

        job = await self.results.job(job_id)
        before = await self.results.jobs.record(job_id)
        pictures: Sequence[bytes] = ()

        def prepare(models: Models, now: float) -> JobRecord:
            if job.status not in ("failed", "cancelled"):
                detail = f"the job is {job.status}; only a failed or cancelled job can be retried"
                raise NotFailed(detail, job_status=job.status)
            if not before.sent:
                models.with_digest(before.digest, ("path", "job_id"))
            own = {"id": new_job_id(now), "created_at": now, "request_id": request_id()}
            return before.model_copy(update={**own, "traceparent": tracing.traceparent()})

        async with self.uploads.of(self.owner) if before.sent else contextlib.nullcontext():
            if before.sent:
                pictures = await self.results.uploaded(job_id, before.total)
            return await self._create(lambda: ["retry", job_id], prepare, is_quick=False, pictures=pictures)

    async def _create(
        self, content: Callable[[], list[Any]], prepare: Prepare, is_quick: bool, pictures: Sequence[bytes]
    ) -> Accepted:
        """Return the job that a request with the same `content` created before, or create one."""
        request, job_id = None, None
        if self.idempotency_key is not None:
            request = IdempotentRequest(self.owner, self.idempotency_key, json.dumps(content(), sort_keys=True))
            job_id = await self.creator.existing_job(request)
        if job_id is not None:
            return self._accepted(job_id)
        record = await self._prepared(prepare, is_quick)
        rate = await self.rate()
        if pictures:
            await self.results.upload(record.id, pictures)
        try:
            job_id = await self.creator.create(NewJob(record, request))
        except NoRoom as error:
            raise _refusal(error.full, record.total, rate) from None
        finally:
            if pictures and job_id != record.id:
                await self.results.remove(record.id)
        return self._accepted(job_id, record)

    async def _prepared(self, prepare: Prepare, is_quick: bool) -> JobRecord:
        """Prepare a job, in a thread unless it is quick: starting a thread takes longer than preparing one picture."""
        models, now = await self.catalog.models(), await self.results.jobs.clock.now()
        return prepare(models, now) if is_quick else await run_in_threadpool(prepare, models, now)

    def _accepted(self, job_id: str, record: JobRecord | None = None) -> Accepted:
        """Name the job in logs, traces and metrics. `record`: if this request made one."""
        tracing.describe({"labelgrid.job_id": job_id})
        if record is None or job_id != record.id:  # the same request created its job first
            bind_contextvars(job_id=job_id)
            return Accepted(job_id, is_new=False)
        PICTURES_ACCEPTED.labels(record.kind).inc(record.total)
        bind_contextvars(job_id=job_id, kind=record.kind, pictures=record.total, model=record.model)
        log.debug("job accepted")
        return Accepted(job_id, is_new=True)

    async def wait(self, accepted: Accepted, wait_s: float) -> Job:
        """Return the job once it has ended, or its state after `wait_s`. Raises ClientGone after a disconnect."""
        if wait_s <= 0:
            return await self.results.job(accepted.job_id)
        gone = asyncio.create_task(_disconnect(self.request))
        try:
            job = await self.results.jobs.wait(accepted.job_id, wait_s, gone, accepted.is_new)
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
        if job.status not in TERMINAL:
            return _json(job, 202, {**headers, "Location": location})
        headers["Content-Location"] = location
        check_finished(job, headers)
        if preferences.png:
            headers["Content-Location"] = f"{location}/grid.png"
            return Response(await self.results.grid(job.id, self.owner), media_type="image/png", headers=headers)
        return _json(job, 200, headers)

    async def rate(self) -> float:
        """Return the pictures that the workers finish per second; 0 while it is unknown. Raises NoWorker."""
        ready = await self.workers()
        if not ready:
            raise NoWorker("no worker is running; nothing was queued", headers={"Retry-After": "10"})
        return float(sum(about.get("pictures_per_s", 0.0) for about in ready))


def check_finished(job: Job, headers: Mapping[str, str]) -> None:
    """Raise JobFailed or JobCancelled for a client that waited for the job's end."""
    location = f"/jobs/{job.id}"
    if job.status == "failed":
        raise JobFailed(job.error or "it failed", headers=headers, job=location)
    if job.status == "cancelled":
        raise JobCancelled("the job was cancelled while you waited for it", headers=headers, job=location)


def _json(job: Job, status: int, headers: Mapping[str, str]) -> Response:
    return Response(job.model_dump_json(), status, headers, media_type="application/json")


async def _disconnect(request: Request) -> None:
    """Return when the client disconnects. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(full: Full, pictures: int, rate: float) -> QueueFull | QuotaExceeded:
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


async def submitter_of(
    request: Request,
    owner: OwnerDep,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=200,
            description="a retry of the same request with the same key returns the same job",
            examples=["order-1234"],
        ),
    ] = None,
) -> Submitter:
    """Return what creates the request's job."""
    state = request.app.state
    return Submitter(
        request,
        state.settings,
        state.store,
        state.creator,
        state.workers,
        state.results,
        state.catalog,
        state.uploads,
        owner,
        idempotency_key,
    )


SubmitterDep = Annotated[Submitter, Depends(submitter_of)]
