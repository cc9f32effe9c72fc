"""POST /jobs/{id}/images/{i}/edit: a picture again, with some of its objects changed and all else as it is."""

import io

from fastapi import APIRouter, Response

from service.api.answers import RESPONSES, PreferencesDep
from service.api.dependencies import CallerDep, Index, OwnJob
from service.api.openapi import problems
from service.api.routes.generate import generate
from service.api.submit import ERRORS
from service.api.uploads import PngError, recipe_of
from service.contract.errors import (
    BadRequest,
    ExpiredJob,
    NoSuchObject,
    NotReady,
    UnknownCheckpoint,
    UnknownJob,
    UnknownPicture,
)
from service.contract.schemas import EditRequest, GenerateRequest, Job

router = APIRouter(tags=["pictures"])


@router.post(
    "/jobs/{job_id}/images/{index}/edit",
    response_model=Job,
    responses={
        **RESPONSES,
        **problems(*ERRORS, NoSuchObject, UnknownCheckpoint, UnknownJob, ExpiredJob, UnknownPicture, NotReady),
    },
    summary="Edit a picture",
)
async def edit_picture(
    job_id: OwnJob, index: Index, body: EditRequest, caller: CallerDep, preferences: PreferencesDep
) -> Response:
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
    return await generate(request, caller, preferences)
