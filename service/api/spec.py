"""The job of a checked request: what it asks for, whether the model has learnt that, and the record to store."""

import secrets
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from service.contract.errors import BadRequest, NotLearnt
from service.contract.job_ids import new_job_id
from service.contract.recipe import Recipe
from service.contract.records import MAX_STAGES_PER_REQUEST, JobKind, JobRecord, Layout, WebhookEvent
from service.contract.schemas import SamplingFields
from service.settings import Settings
from service.telemetry import tracing
from service.telemetry.logs import request_id
from service.webhooks.addresses import AddressNotAllowed, check_url
from shared.checkpoint import CheckpointInfo
from shared.options import MAX_SEED, SamplingOptions

DRAWN_SEED_BITS = 32  # short enough to type
ENDS: Final[tuple[WebhookEvent, ...]] = ("finished", "failed", "cancelled")  # the events of a webhook, by default


@dataclass(frozen=True)
class JobSpec:
    """The job of a request that was checked against the models. A `recipe` determines seed and options.

    info: the denoiser's description, or the evaluator's if the request has pictures. at: the place of the label lists
    in the request. same_labels: that place has a single list, which all pictures share.
    """

    labels: list[list[str]]
    info: CheckpointInfo
    repeats: int = 1
    recipe: Recipe | None = None
    trajectory: int | None = None
    layouts: list[Layout | None] | None = None
    at: tuple[str, ...] = ("body", "labels")
    same_labels: bool = False

    def check_learnt(self) -> None:
        """Raise NotLearnt for the first picture with a number of objects or a layout that the model has not learnt."""
        support = self.info.support
        more = {"model": self.info.name, "support": support.model_dump(mode="json")}
        for i, labels in enumerate(self.labels):
            if problem := support.count_problem(len(labels)):
                raise NotLearnt.at(self.at if self.same_labels else (*self.at, i), problem, entry=i, **more)
        for i, layout in enumerate(self.layouts or ()):
            if layout and (problem := support.layout_problem([(point.x, point.y) for point in layout])):
                raise NotLearnt.at((*self.at[:-1], "layouts", i), problem, entry=i, **more)


def new_record(
    kind: JobKind,
    fields: SamplingFields,
    spec: JobSpec,
    owner: str,
    settings: Settings,
    *,
    created_at: float,
    sent: bool,
) -> JobRecord:
    """Return the job to store. `created_at`: by Redis's clock. `sent`: whether the request has pictures to judge.

    Raises NotLearnt, and BadRequest for options that do not go together, and for a webhook that cannot be used.
    """
    if not sent:
        spec.check_learnt()
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
    if spec.trajectory is not None:
        _check_stages(spec.trajectory, len(spec.labels), options)
    if fields.webhook_events is not None and fields.webhook is None:
        raise BadRequest.at(("body", "webhook_events"), "has no effect without webhook; leave it out")
    if fields.webhook is not None:
        _check_webhook(fields.webhook, settings)
    return JobRecord(
        id=new_job_id(created_at),
        owner=owner,
        kind=kind,
        created_at=created_at,
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


def _check_webhook(url: str, settings: Settings) -> None:
    """Raise BadRequest for a webhook that cannot be used."""
    if settings.webhook_secret is None:
        raise BadRequest.at(("body", "webhook"), "this service has no webhooks: LABELGRID_WEBHOOK_SECRET is not set")
    try:
        check_url(url, settings.webhook_allow_private)
    except AddressNotAllowed as error:
        raise BadRequest.at(("body", "webhook"), str(error)) from error


def _check_stages(trajectory: int, pictures: int, options: SamplingOptions) -> None:
    """Raise BadRequest for a trajectory with more stages than there are steps, or too many for one request."""
    if trajectory > options.steps + 1:
        detail = f"{trajectory} stages; {options.steps} steps have {options.steps + 1}, noise and picture included"
        raise BadRequest.at(("body", "trajectory"), detail)
    if pictures * trajectory > MAX_STAGES_PER_REQUEST:
        detail = f"{pictures} pictures of {trajectory} stages; at most {MAX_STAGES_PER_REQUEST} stages are allowed"
        raise BadRequest.at(("body", "trajectory"), detail)
