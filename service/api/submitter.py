"""From a checked request to a job, and from the job to the answer its client asked for (wait, 202, JSON or PNG).

What POST /generate and POST /score have in common.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from structlog.contextvars import bind_contextvars

from service.api.catalog import Models
from service.api.dependencies import ModelsDep, OwnerDep, ReaderDep, SettingsDep, StoreDep
from service.api.openapi import Responses, header, job_links
from service.api.preferences import Wishes, read_wishes
from service.contract.errors import (
    BadRequest,
    ClientGone,
    JobCancelled,
    JobFailed,
    KeyReuse,
    NoModel,
    NotJson,
    NoWorker,
    QueueFull,
    TooLarge,
    Unavailable,
)
from service.contract.recipe import Recipe
from service.contract.records import (
    MAX_SEED,
    MAX_STAGES_PER_REQUEST,
    TERMINAL,
    JobKind,
    JobRecord,
    Layout,
    WebhookEvent,
)
from service.contract.schemas import EXAMPLE_ID, Job, SamplingFields
from service.settings import Settings
from service.store.idempotency import IdempotentRequest, KeyReused
from service.store.jobs import JobStore, new_id
from service.store.reader import JobReader
from service.telemetry import tracing
from service.telemetry.logs import get_logger, request_id
from service.telemetry.metrics import PICTURES_ACCEPTED
from service.webhooks.addresses import Forbidden, check_url
from shared.checkpoint import CheckpointInfo
from shared.options import SamplingOptions, default_options

log = get_logger(__name__)
UNMEASURED_WAIT_S, MAX_WAIT_S = 10, 3600  # Retry-After of a full queue before workers know their rate, and at most
DRAWN_SEED_BITS = 32  # short enough to be typed again
# What both endpoints document. ERRORS are also those of pictures that are asked for at /v1.
PNG: dict[str, Any] = {"image/png": {"schema": {"type": "string", "format": "binary"}}}
LINKS = job_links("$response.body#/id")
APPLIED = header("the preference that was followed (RFC 7240)", "respond-async")
RESPONSES: Responses = {
    200: {
        "content": PNG,
        "description": "The finished job, or with `Accept: image/png` its grid",
        "headers": {
            "Content-Location": header("where job or grid can be read again", f"/jobs/{EXAMPLE_ID}", always=True),
            "Preference-Applied": APPLIED,
        },
        "links": LINKS,
    },
    202: {
        "model": Job,
        "description": "The job is accepted and not finished yet",
        "headers": {
            "Location": header("where the job can be read", f"/jobs/{EXAMPLE_ID}", always=True),
            "Preference-Applied": APPLIED,
        },
        "links": LINKS,
    },
}
ERRORS = (
    NotJson,
    JobCancelled,
    TooLarge,
    BadRequest,
    KeyReuse,
    QueueFull,
    JobFailed,
    NoModel,
    NoWorker,
    Unavailable,
)
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        description="sent again with the same request, it gives the same job",
        examples=["order-1234"],
    ),
]


def _options(fields: SamplingFields, info: CheckpointInfo) -> SamplingOptions:
    try:
        return fields.sampling(default_options(info.config))
    except ValidationError as error:
        raise BadRequest.from_validation(error) from error


def _check_stages(trajectory: int | None, pictures: int, options: SamplingOptions) -> None:
    if trajectory is None:
        return
    if trajectory > options.steps + 1:
        detail = f"{trajectory} stages; {options.steps} steps have {options.steps + 1}, noise and picture included"
        raise BadRequest.at(("body", "trajectory"), detail)
    if pictures * trajectory > MAX_STAGES_PER_REQUEST:
        detail = f"{pictures} pictures of {trajectory} stages; at most {MAX_STAGES_PER_REQUEST} stages are allowed"
        raise BadRequest.at(("body", "trajectory"), detail)


def _check_fits(queued: int, pictures: int, most: int, rate: float, whose: str = "") -> None:
    """QueueFull if `pictures` more are too many beside `queued`; workers make `rate` of them a second."""
    if queued and (excess := queued + pictures - most) > 0:
        wait_s = math.ceil(min(excess, queued) / rate) if rate > 0 else UNMEASURED_WAIT_S
        detail = f"{queued} pictures {whose}are waiting and {pictures} more would exceed {most}; nothing was queued"
        raise QueueFull(detail, headers={"Retry-After": str(min(wait_s, MAX_WAIT_S))}, queued=queued)


def check_finished(job: Job, headers: Mapping[str, str] | None = None) -> None:
    """For one who waited for the job's end: JobFailed, JobCancelled."""
    location = f"/jobs/{job.id}"
    if job.status == "failed":
        raise JobFailed(job.error or "it failed", headers=headers, job=location)
    if job.status == "cancelled":
        raise JobCancelled("the job was cancelled while you waited for it", headers=headers, job=location)


async def _left(request: Request) -> None:
    """Returns when the client has left. Of a request whose body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class JobSpec:
    """What a request asks for. `labels`, `layouts` and `pictures` are checked.

    With a `recipe`, seed and options are the recipe's. With `pictures`, PNGs, none is made, and `info` is the
    evaluator's.
    """

    kind: JobKind
    fields: SamplingFields
    labels: list[list[str]]
    info: CheckpointInfo
    repeats: int = 1
    recipe: Recipe | None = None
    trajectory: int | None = None
    layouts: list[Layout | None] | None = None
    pictures: Sequence[bytes] | None = None


@dataclass(frozen=True)
class Submitter:
    """Creates jobs and answers with them."""

    request: Request
    settings: Settings
    store: JobStore
    reader: JobReader
    models: Models
    wishes: Wishes
    idempotency_key: str | None
    owner: str

    async def model(self, name: str | None) -> CheckpointInfo:
        return await run_in_threadpool(self.models.find, name)

    async def evaluator(self) -> CheckpointInfo:
        return await run_in_threadpool(self.models.evaluator)

    async def model_of(self, recipe: Recipe) -> CheckpointInfo:
        return await run_in_threadpool(self.models.with_digest, recipe.model.digest)

    def asked(
        self, kind: JobKind, fields: SamplingFields, labels: Sequence[Sequence[str]], pictures: Sequence[bytes] = ()
    ) -> IdempotentRequest | None:
        """The request as its key stands for it, None without one. What was sent counts, not how: JSON and a form may be
        the same. Nor does it matter what a model makes of it, which may be gone when the request comes again."""
        if self.idempotency_key is None:
            return None
        given = fields.model_dump(mode="json", exclude={"labels", "conditions"})
        sent = [hashlib.sha256(png).hexdigest() for png in pictures]
        said = json.dumps([kind, labels, given, sent], sort_keys=True)
        return IdempotentRequest(self.owner, self.idempotency_key, said)

    async def standing(self, asked: IdempotentRequest | None) -> str | None:
        """The id of the job that was created for the same request before. KeyReuse for another request."""
        standing = await self._in_store(self.store.existing_job, asked) if asked else None
        if standing is not None:
            bind_contextvars(job_id=standing)
            tracing.describe({"labelgrid.job_id": standing})
        return standing

    async def submit(self, spec: JobSpec, asked: IdempotentRequest | None) -> Response:
        """Creates the job and answers as wished."""
        return await self.answer(await self.create(spec, asked))

    async def create(self, spec: JobSpec, asked: IdempotentRequest | None) -> str:
        """The id of a new job, or of one that was created for the same request meanwhile."""
        fields, recipe, info = spec.fields, spec.recipe, spec.info
        options = recipe.options if recipe else _options(fields, info)
        given_seed = recipe.seed if recipe else fields.seed
        seed = secrets.randbits(DRAWN_SEED_BITS) if given_seed is None else given_seed
        if seed + spec.repeats - 1 > MAX_SEED:
            raise BadRequest.at(("body", "seed"), f"with {spec.repeats} repeats the last seed would exceed {MAX_SEED}")
        _check_stages(spec.trajectory, len(spec.labels), options)
        events = self._webhook_events(fields)
        await self._check_room(info.digest, len(spec.labels) * spec.repeats)
        record = JobRecord(
            id=new_id(),
            owner=self.owner,
            kind=spec.kind,
            created_at=time.time(),
            model=info.name,
            digest=info.digest,
            labels=spec.labels,
            layouts=spec.layouts,
            seed=seed,
            first=recipe.first if recipe else 0,
            repeats=spec.repeats,
            trajectory=spec.trajectory,
            webhook=fields.webhook,
            webhook_events=events,
            request_id=request_id(),
            traceparent=tracing.traceparent(),
            columns=recipe.columns if recipe else fields.columns,
            options=options,
            sent=spec.pictures is not None,
        )
        job_id = await self._in_store(self.store.create, record, asked, spec.pictures or ())
        assert job_id is not None
        bind_contextvars(job_id=job_id)
        tracing.describe({"labelgrid.job_id": job_id})
        if job_id == record.id:
            PICTURES_ACCEPTED.labels(spec.kind).inc(record.total)
            log.info("job accepted", kind=spec.kind, pictures=record.total, model=info.name)
        return job_id

    async def _check_room(self, digest: str, pictures: int) -> None:
        """NoWorker; QueueFull if so many pictures more are too many. Requests that come at once may pass together."""
        workers = await self.reader.workers()
        if not workers:
            raise NoWorker("no worker is running; nothing was queued", headers={"Retry-After": "10"})
        rate = sum(about.get("pictures_per_s", 0.0) for about in workers)
        _check_fits(await self.reader.open_pictures(digest), pictures, self.settings.max_queued_pictures, rate)
        if self.settings.has_keys:
            own = (await self.reader.pending_by_owner(digest)).get(self.owner, 0)
            _check_fits(own, pictures, self.settings.max_queued_pictures_per_owner, rate, "of yours ")

    def _webhook_events(self, fields: SamplingFields) -> tuple[WebhookEvent, ...]:
        """What a request's webhook is to be told of; nothing if it has none. BadRequest for one that cannot be."""
        if fields.webhook is None:
            if fields.webhook_events is not None:
                raise BadRequest.at(("body", "webhook_events"), "of no use without webhook")
            return ()
        if self.settings.webhook_secret is None:
            raise BadRequest.at(
                ("body", "webhook"), "this service has no webhooks: LABELGRID_WEBHOOK_SECRET is not set"
            )
        try:
            check_url(fields.webhook, self.settings.webhook_allow_private)
        except Forbidden as error:
            raise BadRequest.at(("body", "webhook"), str(error)) from error
        return tuple(fields.webhook_events or ("finished", "failed", "cancelled"))

    async def _in_store(self, method: Callable[..., str | None], *arguments: Any) -> str | None:
        try:
            return await run_in_threadpool(method, *arguments)
        except KeyReused as error:
            raise KeyReuse.at(("header", "Idempotency-Key"), str(error)) from error

    async def wait(self, job_id: str) -> Job:
        """The job once it has ended, or as it stands when the client wants its answer. ClientGone if that leaves."""
        if self.wishes.wait_s <= 0:
            return await self.reader.wait(job_id, 0.0)
        leaving = asyncio.create_task(_left(self.request))
        try:
            async with asyncio.timeout(None) as patience:

                def leave(left: asyncio.Task[None]) -> None:
                    with contextlib.suppress(RuntimeError):  # the wait is over already
                        if not left.cancelled():
                            patience.reschedule(0.0)

                leaving.add_done_callback(leave)
                return await self.reader.wait(job_id, self.wishes.wait_s)
        except TimeoutError:
            leaving.result()  # raises what else ended it
            raise ClientGone(ClientGone.example) from None
        finally:
            leaving.cancel()

    async def answer(self, job_id: str) -> Response:
        """The job, once it has ended or for as long as the client waits, as wished."""
        job = await self.wait(job_id)
        location = f"/jobs/{job_id}"
        headers = {"Vary": "Accept, Prefer"}
        if self.wishes.applied:
            headers["Preference-Applied"] = self.wishes.applied
        if job.status not in TERMINAL:
            return JSONResponse(job.model_dump(mode="json"), 202, {**headers, "Location": location})
        headers["Content-Location"] = location
        check_finished(job, headers)
        if self.wishes.png:
            headers["Content-Location"] = f"{location}/grid.png"
            return Response(await self.reader.grid(job_id), media_type="image/png", headers=headers)
        return JSONResponse(job.model_dump(mode="json"), headers=headers)


async def _submitter(
    request: Request,
    settings: SettingsDep,
    store: StoreDep,
    reader: ReaderDep,
    models: ModelsDep,
    owner: OwnerDep,
    wishes: Annotated[Wishes, Depends(read_wishes)],
    idempotency_key: IdempotencyKey = None,
) -> Submitter:
    return Submitter(request, settings, store, reader, models, wishes, idempotency_key, owner)


SubmitterDep = Annotated[Submitter, Depends(_submitter)]
