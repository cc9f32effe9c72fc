"""From a checked request to a job, and from the job to the answer that the client prefers (wait or 202, JSON or PNG).

The way of every POST that makes pictures: /generate, /score, /jobs/{id}/retry and /v1/images/generations.
"""

import asyncio
import contextlib
import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.request import parse_http_list

from fastapi import Depends, Header, Request, Response
from opentelemetry.trace import get_current_span
from pydantic import ValidationError
from structlog.contextvars import bind_contextvars

from service.api.catalog import Models
from service.api.dependencies import OwnerDep, ServiceDep
from service.api.openapi import PNG, Responses
from service.api.results import Reads
from service.api.uploads import Upload
from service.contract.errors import (
    BadRequest,
    ClientGone,
    ExpiredJob,
    JobCancelled,
    JobFailed,
    KeyReuse,
    NoModel,
    NotFailed,
    NotJson,
    NotLearnt,
    NotReady,
    NoWorker,
    QueueFull,
    QuotaExceeded,
    TooLarge,
    Unavailable,
)
from service.contract.recipe import Recipe
from service.contract.records import (
    MAX_STAGES_PER_REQUEST,
    TERMINAL,
    JobKind,
    JobRecord,
    Layout,
    WebhookEvent,
    new_job_id,
)
from service.contract.schemas import Job, SamplingFields
from service.settings import Settings
from service.store.async_jobs import IdempotentRequest, NoRoom
from service.telemetry import tracing
from service.telemetry.logs import get_logger, request_id
from service.telemetry.metrics import PICTURES_ACCEPTED
from service.webhooks.addresses import AddressNotAllowed, check_url
from shared.checkpoint import CheckpointInfo
from shared.options import LIMITS, MAX_SEED
from shared.vocabulary import LabelError

log = get_logger(__name__)

UNMEASURED_WAIT_S, MAX_WAIT_S = 10, 3600  # Retry-After of a full queue: before workers have a rate, and at most
STORED_WAIT_S = 3600  # Retry-After for an owner with too many stored pictures: jobs expire by the hour
DRAWN_SEED_BITS = 32  # short enough to type
ENDS: Final[tuple[WebhookEvent, ...]] = ("finished", "failed", "cancelled")  # the events of a webhook, by default
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
class JobSpec:
    """The job of a request that was checked against the models. A `recipe` determines seed and options.

    info: the denoiser's description, or the evaluator's if the request has pictures.
    """

    labels: list[list[str]]
    info: CheckpointInfo
    repeats: int = 1
    recipe: Recipe | None = None
    trajectory: int | None = None
    layouts: list[Layout | None] | None = None


def not_learnt(problem: str, info: CheckpointInfo, at: tuple[str | int, ...], entry: int) -> NotLearnt:
    """Return the error for a picture with a number of objects or a layout that the model has not learnt."""
    return NotLearnt.at(at, problem, entry=entry, model=info.name, support=info.support.model_dump(mode="json"))


def check_lists(lists: object, info: CheckpointInfo, at: tuple[str, ...]) -> list[list[str]]:
    """Return the request's label lists.

    Raises BadRequest for lists that are not valid, NotLearnt for a number of objects that the model has not learnt.
    """
    try:
        checked = info.labels.check(lists, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, ".".join(at[1:])) from error
    for i, labels in enumerate(checked):
        if problem := info.support.count_problem(len(labels)):
            raise not_learnt(problem, info, (*at, i), i)
    return checked


def _check_stages(trajectory: int, pictures: int, steps: int) -> None:
    """Raise BadRequest for a trajectory with more stages than there are steps, or too many for one request."""
    if trajectory > steps + 1:
        detail = f"{trajectory} stages; {steps} steps have {steps + 1}, noise and picture included"
        raise BadRequest.at(("body", "trajectory"), detail)
    if pictures * trajectory > MAX_STAGES_PER_REQUEST:
        detail = f"{pictures} pictures of {trajectory} stages; at most {MAX_STAGES_PER_REQUEST} stages are allowed"
        raise BadRequest.at(("body", "trajectory"), detail)


def _check_webhook(fields: SamplingFields, settings: Settings) -> None:
    """Raise BadRequest for a webhook that cannot be used."""
    if fields.webhook is None:
        raise BadRequest.at(("body", "webhook_events"), "has no effect without webhook; leave it out")
    if settings.webhook_secret is None:
        raise BadRequest.at(("body", "webhook"), "this service has no webhooks: LABELGRID_WEBHOOK_SECRET is not set")
    try:
        check_url(fields.webhook, settings.webhook_allow_private)
    except AddressNotAllowed as error:
        raise BadRequest.at(("body", "webhook"), str(error)) from error


def _new_record(kind: JobKind, fields: SamplingFields, spec: JobSpec, owner: str, now: float, sent: bool) -> JobRecord:
    """Return the job to store. `now`: by Redis's clock. `sent`: whether the request has pictures to judge.

    Raises BadRequest for options that do not go together.
    """
    recipe, info = spec.recipe, spec.info
    try:
        options = recipe.options if recipe else fields.sampling(info.sampling)
    except ValidationError as error:
        raise BadRequest.from_validation(error) from error
    if options.steps > info.max_steps:
        detail = f"{options.steps} steps; the model {info.name} takes {info.max_steps} at most"
        raise BadRequest.at(("body", "steps"), detail)
    seed = recipe.seed if recipe else fields.seed
    if seed is None:
        seed = secrets.randbits(DRAWN_SEED_BITS)
    if seed + spec.repeats - 1 > MAX_SEED:
        raise BadRequest.at(("body", "seed"), f"with {spec.repeats} repeats the last seed would exceed {MAX_SEED}")
    return JobRecord(
        id=new_job_id(now),
        owner=owner,
        kind=kind,
        created_at=now,
        model=info.name,
        digest=info.digest,
        labels=spec.labels,
        layouts=spec.layouts,
        seed=seed,
        first=recipe.first if recipe else 0,
        repeats=spec.repeats,
        trajectory=spec.trajectory,
        webhook=fields.webhook,
        webhook_events=tuple(fields.webhook_events or ENDS) if fields.webhook else (),
        request_id=request_id(),
        traceparent=tracing.traceparent(),
        columns=recipe.columns if recipe else fields.columns,
        options=options,
        sent=sent,
    )


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
        pictures: Sequence[Upload] = (),
    ) -> str:
        """Return the request's job: the one that the same request created before, or a new one.

        Same requests have the same Idempotency-Key, fields, labels and pictures, as JSON or as a form. Models do not
        count: they may be gone on a retry. So `check` is called only for a new job.
        """
        same = None
        if self.idempotency_key is not None:
            given = fields.model_dump(mode="json", exclude={"labels"}, exclude_defaults=True)
            same = self._same_as([kind, labels, given, [one.digest for one in pictures]])
            if job_id := await self.service.jobs.existing(same):
                return job_id
        spec = check(await self.service.catalog.models())
        if fields.webhook is not None or fields.webhook_events is not None:
            _check_webhook(fields, self.service.settings)
        now = await self.service.jobs.redis.now()
        record = _new_record(kind, fields, spec, self.owner, now, sent=bool(pictures))
        if record.trajectory is not None:
            _check_stages(record.trajectory, record.total, record.options.steps)
        return await self._create(record, same, [one.read for one in pictures])

    async def retry(self, job_id: str) -> str:
        """Return a new job like one that failed or was cancelled, of the same checkpoint.

        Raises NotFailed, UnknownCheckpoint and what `submit` does.
        """
        jobs, results = self.service.jobs, self.service.results
        status, before = (await jobs.job(job_id)).status, await jobs.record(job_id)
        same = None
        if self.idempotency_key is not None:
            same = self._same_as(["retry", job_id])
            if known := await jobs.existing(same):
                return known
        if status not in ("failed", "cancelled"):
            raise NotFailed(f"the job is {status}; only a failed or cancelled job can be retried", job_status=status)
        if not before.sent:
            (await self.service.catalog.models()).with_digest(before.digest, ("path", "job_id"))
        now = await jobs.redis.now()
        own = {"id": new_job_id(now), "created_at": now, "request_id": request_id()}
        record = before.model_copy(update={**own, "traceparent": tracing.traceparent()})
        try:
            return await self._create(record, same, results.uploaded(job_id, before.total) if before.sent else [])
        except FileNotFoundError as error:
            raise ExpiredJob.of(job_id) from error

    def _same_as(self, content: list[Any]) -> IdempotentRequest:
        """Return what this request has in common with those that repeat it."""
        assert self.idempotency_key is not None
        return IdempotentRequest(self.owner, self.idempotency_key, json.dumps(content, sort_keys=True))

    async def _create(self, record: JobRecord, same: IdempotentRequest | None, pictures: Reads) -> str:
        workers = await self.ready_workers()
        created: str | Exception
        await self.service.results.upload(record.id, pictures)
        try:
            created = await self.service.jobs.create(record, same)
        except NoRoom as error:
            created = _refusal(error, record, workers)
        except KeyReuse as error:
            created = error
        if pictures and created != record.id:  # after any other error the job may exist
            with contextlib.suppress(Unavailable):  # pruning removes them
                await self.service.results.remove(record.id)
        if isinstance(created, Exception):
            raise created
        if created == record.id:  # else the same request created its job first
            PICTURES_ACCEPTED.labels(record.kind).inc(record.total)
            bind_contextvars(kind=record.kind, pictures=record.total, model=record.model)
            log.debug("job accepted", job_id=created)
        return created

    async def ready_workers(self) -> list[dict[str, Any]]:
        """Return what the workers say about themselves. Raises NoWorker if there is none, and one is needed."""
        settings, workers = self.service.settings, self.service.jobs.workers
        ready = await workers()
        if not ready and not settings.accept_without_workers:
            # After the machine stood still, or Redis lost its last writes, a live worker announces itself again
            await asyncio.sleep(settings.heartbeat_s)
            if not (ready := await workers()):
                raise NoWorker("no worker is running; nothing was queued", headers={"Retry-After": "10"})
        return ready

    async def wait(self, job_id: str, wait_s: float) -> None:
        """Return once the job has ended, or after `wait_s`. Raises ClientGone after a disconnect.

        The request's log line and span name the job.
        """
        get_current_span().set_attributes({"labelgrid.job_id": job_id})
        bind_contextvars(job_id=job_id)
        if wait_s <= 0:
            return
        gone = asyncio.create_task(_disconnect(self.request))
        try:
            has_ended = await self.service.jobs.wait(job_id, wait_s, gone)
        finally:
            gone.cancel()
        if gone.done() and not has_ended:
            gone.result()  # raises what else went wrong
            raise ClientGone(ClientGone.example)

    async def answer(self, job_id: str, preferences: Preferences) -> Response:
        """Wait for the job and answer in the form that the client prefers."""
        await self.wait(job_id, preferences.wait_s)
        location = f"/jobs/{job_id}"
        headers = {"Vary": "Accept, Prefer"}
        if preferences.applied:
            headers["Preference-Applied"] = preferences.applied
        if preferences.png:
            try:
                picture = await self.service.jobs.grid(job_id)
            except NotReady:  # or it has ended without one
                pass
            else:
                headers["Content-Location"] = f"{location}/grid.png"
                return await self.service.results.send_grid(job_id, picture, self.owner, headers)
        job = await self.service.jobs.job(job_id)
        has_ended = job.status in TERMINAL
        headers["Content-Location" if has_ended else "Location"] = location
        if has_ended and job.result is None:
            raise why_unfinished(job, headers)
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


def _refusal(full: NoRoom, record: JobRecord, workers: Sequence[Mapping[str, Any]]) -> QueueFull | QuotaExceeded:
    """Return the error for a job that does not fit. workers: what they say about themselves."""
    if full.what == "stored":
        detail = f"{full.taken} pictures of yours are stored and {record.total} more would exceed {full.most}"
        headers = {"Retry-After": str(STORED_WAIT_S)}
        return QuotaExceeded(f"{detail}; delete jobs or retry later", headers=headers, stored=full.taken)
    whose = "of yours " if full.what == "owner" else ""
    excess = full.taken + record.draws - full.most
    rate = sum(about.get("pictures_per_s", 0.0) for about in workers)
    wait_s = math.ceil(min(excess, full.taken) / rate) if rate > 0 else UNMEASURED_WAIT_S
    detail = (
        f"{full.taken} pictures {whose}are waiting and {record.draws} more would exceed {full.most}; nothing was queued"
    )
    return QueueFull(detail, headers={"Retry-After": str(min(wait_s, MAX_WAIT_S))}, queued=full.taken)


SubmitterDep = Annotated[Submitter, Depends()]
