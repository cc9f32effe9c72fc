"""POST /generate: labels or a recipe in, pictures with verdicts out."""

import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message

from service.api.catalog import knows_positions, vocabulary_of
from service.api.openapi import form, problems
from service.api.submitter import ERRORS, RESPONSES, JobSpec, Submitter, SubmitterDep
from service.api.uploads.multipart import read_form
from service.api.uploads.png import PngError, recipe_of
from service.contract.errors import BadForm, BadRequest, UnknownCheckpoint
from service.contract.records import Layout
from service.contract.schemas import BESIDE_RECIPE, GenerateRequest, Job
from shared.checkpoint import CheckpointInfo
from shared.options import LIMITS
from shared.vocabulary import LabelError

FILE = "file"
FIELDS = GenerateRequest.model_json_schema()["properties"]
FORM = form(
    {FILE: ("image/png", "a PNG of ours, with its recipe")},
    {name: FIELDS[name] for name in sorted(BESIDE_RECIPE - {"recipe"})},
)


class PngOrJson(APIRoute):
    """A route that takes, in place of its JSON, a form with a PNG: the PNG stands for {"recipe": what it carries}."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_either(request: Request) -> Response:
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            return await handle(await _as_json(request) if content_type == "multipart/form-data" else request)

        return handle_either


async def _as_json(request: Request) -> Request:
    fields, files = await read_form(request, {FILE: None})
    if FILE not in files:
        raise BadRequest.at(("body", FILE), "Field required")
    try:
        recipe = recipe_of(files[FILE])
    except PngError as error:
        raise BadRequest.at(("body", FILE), str(error)) from error
    content = json.dumps({**fields, "recipe": recipe.model_dump(mode="json")}).encode()

    unread: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        return unread.pop() if unread else await request.receive()

    headers = [pair for pair in request.scope["headers"] if pair[0] not in (b"content-type", b"content-length")]
    return Request({**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}, receive)


router = APIRouter(tags=["pictures"], route_class=PngOrJson)


@router.post(
    "/generate",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, BadForm, UnknownCheckpoint)},
    openapi_extra={"requestBody": {"content": {"multipart/form-data": FORM}}},
    summary="Make pictures from labels, or again by their recipe",
)
async def generate(body: GenerateRequest, submitter: SubmitterDep) -> Response:
    """Makes one picture for each list of labels, scores it, and waits for it unless `Prefer` says otherwise.

    With a recipe, as JSON or as the PNG that carries it, the same pictures are made again.
    """
    given = (body.recipe or body).labels
    asked = submitter.asked("generate", body, given)
    if standing := await submitter.standing(asked):
        return await submitter.answer(standing)
    return await submitter.submit(await _spec(body, given, submitter), asked)


async def _spec(body: GenerateRequest, given: Sequence[Sequence[str]], submitter: Submitter) -> JobSpec:
    """What is asked for, checked. BadRequest, UnknownCheckpoint, NoModel."""
    recipe = body.recipe
    info = await (submitter.model_of(recipe) if recipe else submitter.model(body.model))
    try:
        labels = vocabulary_of(info).check(given, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, "recipe.labels" if recipe else "labels") from error
    layouts = (recipe or body).layouts
    if layouts is not None:
        check_layouts(layouts, labels, info, ("body", "recipe", "layouts") if recipe else ("body", "layouts"))
        layouts = layouts if any(layouts) else None
    trajectory = recipe.trajectory if recipe and body.trajectory is None else body.trajectory
    return JobSpec("generate", body, labels, info, recipe=recipe, trajectory=trajectory, layouts=layouts)


def check_layouts(
    layouts: Sequence[Layout | None], labels: Sequence[Sequence[str]], info: CheckpointInfo, at: tuple[str, ...]
) -> None:
    """BadRequest, with the entry, for layouts that do not fit the label lists, or that the model is not made for."""
    if len(layouts) != len(labels):
        raise BadRequest.at(at, f"{len(layouts)} layouts; wanted {len(labels)}, one for each label list, or null")
    for i, (layout, asked) in enumerate(zip(layouts, labels, strict=True)):
        if layout is None:
            continue
        if not knows_positions(info):
            raise BadRequest.at((*at, i), f"the model {info.name} does not know where objects stand", entry=i)
        if len(layout) != len(asked):
            raise BadRequest.at((*at, i), f"{len(layout)} points; wanted {len(asked)}, one for each label", entry=i)
