"""POST /generate: pictures with verdicts, from labels or from a recipe."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from service.api.catalog import Finder, knows_positions
from service.api.jobs.spec import JobSpec
from service.api.jobs.submitter import ERRORS, READS_AND_ANSWERS, RESPONSES, Submitter, submitter_of
from service.api.openapi_parts import SCHEMAS, problems
from service.api.uploads.body import describe_body, describe_form, opened_body, validate
from service.api.uploads.png import PngError, recipe_of
from service.contract.errors import BadForm, BadRequest, UnknownCheckpoint, UnsupportedBody
from service.contract.recipe import Recipe
from service.contract.records import Layout
from service.contract.schemas import BESIDE_RECIPE, GenerateRequest, Job
from shared.checkpoint import CheckpointInfo
from shared.options import LIMITS
from shared.vocabulary import LabelError

router = APIRouter(tags=["pictures"])

FILE = "file"
FIELDS = GenerateRequest.model_json_schema()["properties"]
BODY = describe_body(
    {"schema": {"$ref": SCHEMAS + GenerateRequest.__name__}},
    describe_form(
        {FILE: ("image/png", "a PNG from this service, with its recipe")},
        {name: FIELDS[name] for name in sorted(BESIDE_RECIPE - {"recipe"})},
    ),
)


@router.post(
    "/generate",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, BadForm, UnknownCheckpoint)},
    openapi_extra={**BODY, **READS_AND_ANSWERS},
    summary="Generate pictures from labels, or again from a recipe",
)
async def generate(request: Request) -> Response:
    """Generates one picture for each list of labels, scores it, and waits for it unless `Prefer` says otherwise.

    A recipe, as JSON or as the PNG that carries it, generates the same pictures again.
    """
    submitter = submitter_of(request)
    body = await _read(request, submitter)
    labels = (body.recipe or body).labels
    accepted = await submitter.submit("generate", body, labels, partial(_check, body))
    return await submitter.answer(accepted)


async def _read(request: Request, submitter: Submitter) -> GenerateRequest:
    """Read the body. A form's PNG stands for {"recipe": the recipe that it carries}."""
    try:
        async with opened_body(request, FILE) as (content, files):
            if files:
                content["recipe"] = await _recipe(content, files[FILE], submitter)
    except UnsupportedBody as error:  # 422 here and 415 at /score: clients may rely on either
        raise BadRequest.at(("header", "content-type"), error.detail) from error
    return validate(GenerateRequest, content)


async def _recipe(content: Mapping[str, Any], file: UploadFile, submitter: Submitter) -> Recipe:
    if "recipe" in content:
        raise BadRequest.at(("body", "recipe"), f"{FILE} carries the recipe; leave it out")
    async with submitter.uploads.of(submitter.owner):
        try:
            return await run_in_threadpool(recipe_of, await file.read())
        except PngError as error:
            raise BadRequest.at(("body", FILE), str(error)) from error


def _check(body: GenerateRequest, models: Finder) -> JobSpec:
    """Check the request against the models. Raises BadRequest, UnknownCheckpoint, NoModel."""
    recipe = body.recipe
    source = recipe or body
    at = ("body", "recipe") if recipe else ("body",)
    info = models.with_digest(recipe.model.digest) if recipe else models.find(body.model)
    try:
        labels = info.labels.check(source.labels, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, ".".join((*at[1:], "labels"))) from error
    layouts = source.layouts
    if layouts is not None:
        check_layouts(layouts, labels, info, (*at, "layouts"))
        layouts = layouts if any(layouts) else None
    trajectory = recipe.trajectory if recipe and body.trajectory is None else body.trajectory
    return JobSpec(labels, info, recipe=recipe, trajectory=trajectory, layouts=layouts, at=(*at, "labels"))


def check_layouts(
    layouts: Sequence[Layout | None], labels: Sequence[Sequence[str]], info: CheckpointInfo, at: tuple[str, ...]
) -> None:
    """Raise BadRequest, with the entry, for layouts that do not match the label lists or that the model cannot use."""
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
