"""POST /generate: pictures with verdicts, from labels or from a recipe.

/generate/png takes the recipe in a PNG, and /jobs/{id}/images/{i}/edit that of a job's picture.
"""

import io
from typing import Annotated

from fastapi import APIRouter, Form, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from pydantic import Field, Json

from service.api.answers import HEADERS, RESPONSES, answer
from service.api.dependencies import CallerDep, Index, OwnJob
from service.api.openapi import problems
from service.api.submit import ERRORS, create, new_record, same_request
from service.api.uploads import PngError, recipe_of
from service.contract.checks import check_layouts, check_lists
from service.contract.edit_checks import checked_edits
from service.contract.errors import (
    BadForm,
    BadRequest,
    ExpiredJob,
    NoSuchObject,
    NotReady,
    UnknownCheckpoint,
    UnknownJob,
    UnknownPicture,
)
from service.contract.schemas import EditRequest, GenerateRequest, Job, JobFields, Stages, with_examples
from shared.edits import MAX_EDITS, Edit

router = APIRouter(tags=["pictures"])


@router.post(
    "/generate",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, NoSuchObject, UnknownCheckpoint)},
    openapi_extra=HEADERS,
    summary="Generate pictures from labels, or again from a recipe",
)
async def generate(body: GenerateRequest, caller: CallerDep) -> Response:
    """Generates one picture for each list of labels, scores it, and waits for it unless `Prefer` says otherwise.

    A recipe generates the same pictures again. `edits` change the objects that they name in each picture.
    """
    same = same_request(caller, "generate", body, (body.recipe or body).labels)
    job_id = await caller.service.jobs.known(same)
    if job_id is None:
        models, source = await caller.service.catalog.models(), body.recipe or body
        at = ("body", "recipe") if body.recipe else ("body",)
        info = models.with_digest(body.recipe.model.digest) if body.recipe else models.find(body.model)
        labels = check_lists(source.labels, info, (*at, "labels"))
        layouts = check_layouts(source.layouts, labels, info, (*at, "layouts"))
        recipe = checked_edits(body, info)
        trajectory = recipe.trajectory if recipe and body.trajectory is None else body.trajectory
        record = await new_record(
            caller, "generate", body, info, labels, layouts=layouts, trajectory=trajectory, recipe=recipe
        )
        job_id = await create(caller.service, record, same)
    return await answer(caller, job_id)


class PngForm(JobFields):
    """A PNG of this service, and what may stand beside its recipe."""

    model_config = with_examples({"file": "the bytes of a PNG"})

    file: UploadFile = Field(description="a PNG from this service, with its recipe")
    edits: list[Json[Edit]] | None = Field(
        None, max_length=MAX_EDITS, description="changes to each picture, in this order, each as JSON; all else stays"
    )
    trajectory: Stages = None


@router.post(
    "/generate/png",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, BadForm, NoSuchObject, UnknownCheckpoint)},
    openapi_extra=HEADERS,
    summary="Generate the pictures of a PNG again",
)
async def generate_from_png(
    form: Annotated[PngForm, Form(media_type="multipart/form-data")],
    caller: CallerDep,
) -> Response:
    """Generates the pictures of the recipe in a PNG of this service, as `POST /generate` does with `recipe`."""
    async with caller.service.uploads.of(caller.owner):
        try:
            recipe = await run_in_threadpool(recipe_of, form.file.file)
        except PngError as error:
            raise BadRequest.at(("body", "file"), str(error)) from error
    await form.file.close()
    beside = form.model_dump(exclude={"file"}, exclude_unset=True)
    body = GenerateRequest.model_validate({**beside, "recipe": recipe})
    return await generate(body, caller)


@router.post(
    "/jobs/{job_id}/images/{index}/edit",
    response_model=Job,
    responses={
        **RESPONSES,
        **problems(*ERRORS, NoSuchObject, UnknownCheckpoint, UnknownJob, ExpiredJob, UnknownPicture, NotReady),
    },
    openapi_extra=HEADERS,
    summary="Edit a picture",
)
async def edit_picture(job_id: OwnJob, index: Index, body: EditRequest, caller: CallerDep) -> Response:
    """Adds, removes, moves or recolours objects of a finished picture; the others and the background stay.

    Does the same as `POST /generate` with the picture's recipe and `edits`: a new job with one picture, whose recipe
    has all edits so far.
    """
    png = await caller.service.results.image(job_id, caller.owner, index)
    try:
        recipe = recipe_of(io.BytesIO(png))
    except PngError as error:  # of an uploaded picture
        raise BadRequest.at(("path", "index"), f"the picture cannot be edited: {error}") from error
    request = GenerateRequest.model_validate({**body.model_dump(exclude_unset=True), "recipe": recipe})
    return await generate(request, caller)
