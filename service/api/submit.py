"""From a request for pictures to its job: every POST that makes pictures goes this way.

A route asks for the job that the same request created before (`same_request`, `AsyncJobs.known`), or else checks the
request (`contract/checks.py`) and creates its job (`new_record`, `create`); then it answers with the job
(`answers.py`).
"""

import asyncio
import contextlib
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError
from structlog.contextvars import bind_contextvars

from service.api.dependencies import Caller, Service
from service.api.results import Reads
from service.api.uploads import Upload
from service.contract.checks import check_sampling, check_stages
from service.contract.errors import (
    BadRequest,
    DeadlineExceeded,
    JobCancelled,
    JobFailed,
    KeyReuse,
    NoModel,
    NotJson,
    NotLearnt,
    NoWorker,
    QueueFull,
    QuotaExceeded,
    TooLarge,
    Unavailable,
)
from service.contract.recipe import Recipe
from service.contract.records import JobKind, JobRecord, Layout, WebhookEvent, new_job_id
from service.contract.schemas import JobFields, SamplingFields
from service.settings import Settings
from service.store.async_jobs import IdempotentRequest, NoRoom, open_job
from service.telemetry import tracing
from service.telemetry.logs import get_logger, request_id
from service.telemetry.metrics import PICTURES_ACCEPTED
from service.webhooks.addresses import AddressNotAllowed, check_url
from shared.checkpoint import CheckpointInfo
from shared.options import MAX_SEED

log = get_logger(__name__)

UNMEASURED_WAIT_S, MAX_WAIT_S = 10, 3600  # Retry-After of a full queue: before workers have a rate, and at most
STORED_WAIT_S = 3600  # Retry-After for an owner with too many stored pictures: jobs expire by the hour
DRAWN_SEED_BITS = 32  # short enough to type
ENDS: Final[tuple[WebhookEvent, ...]] = ("finished", "failed", "cancelled")  # the events of a webhook, by default
# The errors that every route documents which creates a job and waits for it.
ERRORS = (
    NotJson, JobCancelled, TooLarge, BadRequest, NotLearnt, KeyReuse, QueueFull, QuotaExceeded, JobFailed, NoModel,
    NoWorker, DeadlineExceeded, Unavailable,
)  # fmt: skip


def same_request(
    caller: Caller,
    kind: JobKind,
    fields: SamplingFields,
    labels: Sequence[Sequence[str]],
    pictures: Sequence[Upload] = (),
) -> IdempotentRequest | None:
    """Return what a request has in common with those that repeat it; None if it has no Idempotency-Key.

    Same requests have the same key, fields, labels and pictures, as JSON or as a form. Models do not count: they may be
    gone on a retry.
    """
    if caller.idempotency_key is None:
        return None
    given = fields.model_dump(mode="json", exclude={"labels"}, exclude_defaults=True)
    return caller.same(kind, labels, given, [one.digest for one in pictures])


async def new_record(
    caller: Caller,
    kind: JobKind,
    fields: SamplingFields,
    info: CheckpointInfo,
    labels: list[list[str]],
    *,
    repeats: int = 1,
    layouts: list[Layout | None] | None = None,
    trajectory: int | None = None,
    recipe: Recipe | None = None,
    uploaded: bool = False,
) -> JobRecord:
    """Return the job of a request whose labels and layouts were checked against the model `info`.

    recipe: determines seed and options. uploaded: the request has the pictures, and `info` is the evaluator.
    Raises BadRequest for fields that do not go together.
    """
    _check_webhook(fields, caller.service.settings)
    try:
        options = recipe.options if recipe else fields.sampling(info.sampling)
    except ValidationError as error:
        raise BadRequest.from_validation(error) from error
    check_sampling(options, info, (await caller.service.catalog.models()).denoisers)
    seed = recipe.seed if recipe else fields.seed
    if seed is None:
        seed = secrets.randbits(DRAWN_SEED_BITS)
    if seed + repeats - 1 > MAX_SEED:
        raise BadRequest.at(("body", "seed"), f"with {repeats} repeats the last seed would exceed {MAX_SEED}")
    if trajectory is not None:
        check_stages(trajectory, len(labels) * repeats, options.steps)
    return JobRecord(
        **await new_ids(caller.service),
        owner=caller.owner,
        kind=kind,
        model=info.name,
        digest=info.digest,
        labels=labels,
        layouts=layouts,
        seed=seed,
        first=recipe.first if recipe else 0,
        repeats=repeats,
        trajectory=trajectory,
        deadline_s=fields.deadline_s,
        webhook=fields.webhook,
        webhook_events=tuple(fields.webhook_events or ENDS) if fields.webhook else (),
        columns=recipe.columns if recipe else fields.columns,
        options=options,
        uploaded=uploaded,
    )


def _check_webhook(fields: JobFields, settings: Settings) -> None:
    """Raise BadRequest for a webhook that cannot be used."""
    if fields.webhook is None and fields.webhook_events is None:
        return
    if fields.webhook is None:
        raise BadRequest.at(("body", "webhook_events"), "has no effect without webhook; leave it out")
    if settings.webhook_secret is None:
        raise BadRequest.at(("body", "webhook"), "this service has no webhooks: LABELGRID_WEBHOOK_SECRET is not set")
    try:
        check_url(fields.webhook, settings.webhook_allow_private)
    except AddressNotAllowed as error:
        raise BadRequest.at(("body", "webhook"), str(error)) from error


async def new_ids(service: Service) -> dict[str, Any]:
    """Return what sets a new job apart from one that asks for the same."""
    now = await service.jobs.redis.now()
    return {
        "id": new_job_id(now),
        "created_at": now,
        "request_id": request_id(),
        "traceparent": tracing.traceparent(),
    }


async def create(service: Service, record: JobRecord, same: IdempotentRequest | None, pictures: Reads = ()) -> str:
    """Store a job, with the pictures that it is to judge, and queue it. Return its id.

    If the `same` request has created a job meanwhile, return that one's id. Raises NoWorker, QueueFull, QuotaExceeded,
    KeyReuse, Unavailable, and what reading the pictures raises; then no job and no picture is left.
    """
    workers = await ready_workers(service)
    if record.deadline_s is not None:
        await _check_deadline(service, record, record.deadline_s)
    if pictures:
        await service.results.upload(record.id, pictures)
    try:
        job_id = await service.jobs.create(record, same)
    except NoRoom as error:
        await _forget(service, record, pictures)
        raise _refusal(error, record, workers) from error
    except KeyReuse:
        await _forget(service, record, pictures)
        raise  # after any other error the job may exist
    if job_id != record.id:
        await _forget(service, record, pictures)
        return job_id
    PICTURES_ACCEPTED.labels(record.kind).inc(record.total)
    bind_contextvars(kind=record.kind, pictures=record.total, model=record.model)
    log.debug("job accepted", job_id=job_id)
    return job_id


async def _check_deadline(service: Service, record: JobRecord, deadline_s: float) -> None:
    """Raise DeadlineExceeded for a job that would be done too late."""
    found = await service.jobs.forecast(record.digest, open_job(record))
    if found is not None and found.seconds > deadline_s:
        detail = f"the job would be done in {found.seconds:.0f} s, after its deadline of {deadline_s:g} s"
        headers = {"Retry-After": str(min(math.ceil(found.seconds - deadline_s), MAX_WAIT_S))}
        raise DeadlineExceeded(f"{detail}; nothing was queued", headers=headers, ahead=found.ahead)


async def _forget(service: Service, record: JobRecord, pictures: Reads) -> None:
    """Remove the pictures that were stored for a job which was not created."""
    if pictures:
        with contextlib.suppress(Unavailable):  # pruning removes them
            await service.results.remove(record.id)


async def ready_workers(service: Service) -> list[dict[str, Any]]:
    """Return what the workers say about themselves. Raises NoWorker if there is none, and one is needed."""
    settings, workers = service.settings, service.jobs.workers
    ready = await workers()
    if not ready and not settings.accept_without_workers:
        # After the machine stood still, or Redis lost its last writes, a live worker announces itself again
        await asyncio.sleep(settings.heartbeat_s)
        if not (ready := await workers()):
            raise NoWorker("no worker is running; nothing was queued", headers={"Retry-After": "10"})
    return ready


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
