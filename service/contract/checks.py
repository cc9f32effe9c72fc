"""Checks a request for pictures against the model that it names. Raises what the client did wrong.

The API and `labelgrid.load` refuse the same requests with the same sentences. Knows no storage and no torch.
"""

from collections.abc import Iterable, Sequence

from service.contract.errors import BadRequest, NotLearnt
from service.contract.records import MAX_STAGES_PER_REQUEST, Layout
from shared.checkpoint import CheckpointInfo
from shared.options import LIMITS, SamplingOptions
from shared.vocabulary import LabelError


def knows_positions(info: CheckpointInfo) -> bool:
    """Return whether the model takes layouts."""
    network = info.config.get("network")
    return isinstance(network, dict) and network.get("positions") is True


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


def check_sampling(options: SamplingOptions, info: CheckpointInfo, denoisers: Iterable[CheckpointInfo]) -> None:
    """Raise BadRequest for more steps than the model takes, and for guidance of a model that draws in one call.

    The message names the first of the other `denoisers` that has the same labels and takes them, if there is one.
    """
    if options.steps > info.max_steps:
        field, detail = "steps", f"{options.steps} steps; the model {info.name} takes {info.max_steps} at most"
    elif info.is_one_call and options.guidance != 1:
        field = "guidance"
        detail = f"{options.guidance:g}; the model {info.name} draws in one call, without guidance: 1"
    else:
        return
    others = (one for one in denoisers if one.vocabulary == info.vocabulary and not one.is_one_call)
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
