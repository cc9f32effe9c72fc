"""Checks a request for pictures against the model that it names. Raises what the client did wrong."""

from collections.abc import Sequence

from service.api.catalog import Models, knows_positions
from service.contract.errors import BadRequest, NotLearnt
from service.contract.records import MAX_STAGES_PER_REQUEST, Layout
from service.contract.schemas import JobFields
from service.settings import Settings
from service.webhooks.addresses import AddressNotAllowed, check_url
from shared.checkpoint import CheckpointInfo
from shared.options import LIMITS, SamplingOptions
from shared.vocabulary import LabelError


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


def check_layouts(
    layouts: list[Layout | None] | None, labels: Sequence[Sequence[str]], info: CheckpointInfo, at: tuple[str, ...]
) -> list[Layout | None] | None:
    """Return the request's layouts; None if it has none.

    Raises BadRequest, with the entry, for layouts that do not match the label lists or that the model cannot use;
    NotLearnt for places that it has not learnt.
    """
    if layouts is None:
        return None
    if len(layouts) != len(labels):
        raise BadRequest.at(at, f"{len(layouts)} layouts; wanted {len(labels)}, one for each label list, or null")
    for i, (layout, entry) in enumerate(zip(layouts, labels, strict=True)):
        if layout is None:
            continue
        if not knows_positions(info):
            detail = f"the model {info.name} takes no layouts; GET /models lists those with `positions`"
            raise BadRequest.at((*at, i), detail, entry=i)
        if len(layout) != len(entry):
            raise BadRequest.at((*at, i), f"{len(layout)} points; wanted {len(entry)}, one for each label", entry=i)
        if problem := info.support.layout_problem([(point.x, point.y) for point in layout]):
            raise not_learnt(problem, info, (*at, i), i)
    return layouts if any(layouts) else None


def check_sampling(options: SamplingOptions, info: CheckpointInfo, models: Models) -> None:
    """Raise BadRequest for more steps than the model takes, and for guidance of a model that draws in one call.

    The message names a model of the same labels that takes them, if there is one.
    """
    if options.steps > info.max_steps:
        field, detail = "steps", f"{options.steps} steps; the model {info.name} takes {info.max_steps} at most"
    elif info.is_one_call and options.guidance != 1:
        field = "guidance"
        detail = f"{options.guidance:g}; the model {info.name} draws in one call, without guidance: 1"
    else:
        return
    others = (one for one in models.denoisers if one.vocabulary == info.vocabulary and not one.is_one_call)
    if able := next((one.name for one in others if one.max_steps >= options.steps), None):
        detail += f"; {able} takes {getattr(options, field):g}"
    raise BadRequest.at(("body", field), detail)


def check_stages(trajectory: int, pictures: int, steps: int) -> None:
    """Raise BadRequest for a trajectory with more stages than there are steps, or too many for one request."""
    if trajectory > steps + 1:
        counted = "1 step has" if steps == 1 else f"{steps} steps have"
        detail = f"{trajectory} stages; {counted} {steps + 1}, noise and picture included"
        raise BadRequest.at(("body", "trajectory"), detail)
    if pictures * trajectory > MAX_STAGES_PER_REQUEST:
        detail = f"{pictures} pictures of {trajectory} stages; at most {MAX_STAGES_PER_REQUEST} stages are allowed"
        raise BadRequest.at(("body", "trajectory"), detail)


def check_webhook(fields: JobFields, settings: Settings) -> None:
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
