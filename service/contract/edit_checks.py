"""Checks the edits of a request, or of a recipe, against the picture that they change and the model that draws it."""

from collections.abc import Mapping, Sequence

from service.contract.checks import knows_positions, not_learnt
from service.contract.errors import BadRequest, NoSuchObject
from service.contract.recipe import Recipe
from service.contract.records import Point
from service.contract.schemas import GenerateRequest
from shared.checkpoint import CheckpointInfo
from shared.edits import MAX_EDITS, Edit, EditError, edited
from shared.support import Place
from shared.vocabulary import LabelError

Objects = Mapping[str, Place | None]  # of a picture: label -> place, None if it is not known


def checked_edits(body: GenerateRequest, info: CheckpointInfo) -> Recipe | None:
    """Return the request's recipe, with the request's edits added to its own; None without a recipe.

    Raises BadRequest, NoSuchObject, NotLearnt.
    """
    recipe, source = body.recipe, body.recipe or body
    before = recipe.options.edits or () if recipe else ()
    if not (before or body.edits):
        return recipe
    layouts = source.layouts or [None] * len(source.labels)
    pictures = [_objects(*one) for one in zip(source.labels, layouts, strict=True)]
    if before:
        pictures = _check(pictures, before, info, ("body", "recipe", "options", "edits"))
    if not body.edits:
        return recipe
    if recipe:  # its verdicts know where the seed has put the objects
        drawn = [one.places for one in recipe.verdicts] + [None] * len(pictures)
        pictures = [
            _objects(list(one), places) if places and len(places) == len(one) else one
            for one, places in zip(pictures, drawn, strict=False)
        ]
    _check(pictures, body.edits, info, ("body", "edits"))
    if len(before) + len(body.edits) > MAX_EDITS:
        detail = f"{len(body.edits)} edits after {len(before)}; a picture takes {MAX_EDITS} at most"
        raise BadRequest.at(("body", "edits"), detail)
    if recipe is None:
        return None
    options = recipe.options.model_copy(update={"edits": (*before, *body.edits)})
    return recipe.model_copy(update={"options": options})


def _objects(labels: Sequence[str], points: Sequence[Point] | None) -> Objects:
    places = [(point.x, point.y) for point in points] if points else [None] * len(labels)
    return dict(zip(labels, places, strict=True))


def _check(
    pictures: Sequence[Objects], edits: Sequence[Edit], info: CheckpointInfo, at: tuple[str, ...]
) -> list[Objects]:
    """Return the objects of the pictures after the edits, all of which change each picture."""
    if not knows_positions(info):
        detail = (
            f"the model {info.name} takes no edits, as it knows no positions; GET /models lists those with `positions`"
        )
        raise BadRequest.at(at, detail)
    for i, edit in enumerate(edits):
        try:
            info.labels.encode(edit.new_labels)
        except LabelError as error:
            raise BadRequest.at((*at, i), error.problem, label=error.label) from error
    return [_check_one(one, entry, edits, info, at) for entry, one in enumerate(pictures)]


def _check_one(
    before: Objects, entry: int, edits: Sequence[Edit], info: CheckpointInfo, at: tuple[str, ...]
) -> Objects:
    try:
        objects = edited(list(before), edits)
    except EditError as error:
        kind = NoSuchObject if error.is_missing else BadRequest
        raise kind.at((*at, error.index), str(error), entry=entry) from error
    kept = [before[one.origin] for one in objects if one.place is None and one.origin]
    placed = [one.place for one in objects if one.place]
    problem = info.support.count_problem(len(objects)) or info.support.layout_problem(placed, list(filter(None, kept)))
    if problem:
        raise not_learnt(problem, info, at, entry)
    return {one.label: one.place or before.get(one.origin or "") for one in objects}
