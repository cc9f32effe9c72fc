"""POST /generate: pictures with verdicts, from labels or from a recipe. /generate/png takes the recipe in a PNG."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Form, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from pydantic import Field, Json

from service.api.catalog import Models, knows_positions
from service.api.edits import checked_edits
from service.api.openapi import problems
from service.api.submit import ERRORS, RESPONSES, JobSpec, PreferencesDep, SubmitterDep, check_lists, not_learnt
from service.api.uploads import PngError, recipe_of
from service.contract.errors import BadForm, BadRequest, NoSuchObject, UnknownCheckpoint
from service.contract.records import Layout
from service.contract.schemas import GenerateRequest, Job, Stages, WebhookEvents, WebhookUrl, with_examples
from shared.checkpoint import CheckpointInfo
from shared.edits import MAX_EDITS, Edit
from shared.options import NoOtherFields

router = APIRouter(tags=["pictures"])


@router.post(
    "/generate",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, NoSuchObject, UnknownCheckpoint)},
    summary="Generate pictures from labels, or again from a recipe",
)
async def generate(body: GenerateRequest, submitter: SubmitterDep, preferences: PreferencesDep) -> Response:
    """Generates one picture for each list of labels, scores it, and waits for it unless `Prefer` says otherwise.

    A recipe generates the same pictures again. `edits` change the objects that they name in each picture.
    """
    labels = (body.recipe or body).labels
    return await submitter.answer(await submitter.submit("generate", body, labels, partial(_check, body)), preferences)


class PngForm(NoOtherFields):
    """A PNG of this service, and what may stand beside its recipe."""

    model_config = with_examples({"file": "the bytes of a PNG"})

    file: UploadFile = Field(description="a PNG from this service, with its recipe")
    edits: list[Json[Edit]] | None = Field(
        None, max_length=MAX_EDITS, description="changes to each picture, in this order, each as JSON; all else stays"
    )
    trajectory: Stages = None
    webhook: WebhookUrl = None
    webhook_events: WebhookEvents = None


@router.post(
    "/generate/png",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, BadForm, NoSuchObject, UnknownCheckpoint)},
    summary="Generate the pictures of a PNG again",
)
async def generate_from_png(
    form: Annotated[PngForm, Form(media_type="multipart/form-data")],
    submitter: SubmitterDep,
    preferences: PreferencesDep,
) -> Response:
    """Generates the pictures of the recipe in a PNG of this service, as `POST /generate` does with `recipe`."""
    async with submitter.service.uploads.of(submitter.owner):
        try:
            recipe = await run_in_threadpool(recipe_of, form.file.file)
        except PngError as error:
            raise BadRequest.at(("body", "file"), str(error)) from error
    await form.file.close()
    beside = form.model_dump(exclude={"file"}, exclude_unset=True)
    body = GenerateRequest.model_validate({**beside, "recipe": recipe})
    return await generate(body, submitter, preferences)


def _check(body: GenerateRequest, models: Models) -> JobSpec:
    """Check the request against the models. Raises BadRequest, UnknownCheckpoint, NoModel."""
    source = body.recipe or body
    at = ("body", "recipe") if body.recipe else ("body",)
    info = models.with_digest(body.recipe.model.digest) if body.recipe else models.find(body.model)
    labels = check_lists(source.labels, info, (*at, "labels"))
    layouts = source.layouts
    if layouts is not None:
        check_layouts(layouts, labels, info, (*at, "layouts"))
        layouts = layouts if any(layouts) else None
    recipe = checked_edits(body, info)
    trajectory = recipe.trajectory if recipe and body.trajectory is None else body.trajectory
    return JobSpec(labels, info, recipe=recipe, trajectory=trajectory, layouts=layouts)


def check_layouts(
    layouts: Sequence[Layout | None], labels: Sequence[Sequence[str]], info: CheckpointInfo, at: tuple[str, ...]
) -> None:
    """Raise BadRequest, with the entry, for layouts that do not match the label lists or that the model cannot use;
    NotLearnt for places that it has not learnt.
    """
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
