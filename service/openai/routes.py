"""/v1: OpenAI's images and models API, for clients written for it. docs/api.md."""

import io
import math
from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from PIL import Image as PictureFile

from service.api.catalog import Models
from service.api.dependencies import Index, ModelsDep, OwnerDep, OwnJob, ServiceDep
from service.api.events import HEADERS
from service.api.openapi import PNG, DocumentedAPI
from service.api.results import CutStream, Slots
from service.api.submit import ERRORS, JobSpec, Submitter, SubmitterDep, not_learnt, why_unfinished
from service.contract.errors import (
    BadRequest,
    ExpiredJob,
    NotFound,
    NotInTime,
    NotReady,
    Unavailable,
    UnknownJob,
    UnknownPicture,
)
from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.openai.errors import problems, with_openai_error
from service.openai.prompt import parse_prompt
from service.openai.schemas import Image, Images, ImagesRequest, OpenAIModel, OpenAIModels, OpenAIProblem
from service.openai.sizes import (
    MOST_PIXELS,
    PATTERN,
    Size,
    one_by_one,
    parse_size,
    scaled,
    size_of,
    with_base64,
)
from service.openai.stream import ImageStream
from shared.checkpoint import CheckpointInfo
from shared.support import picture_size
from shared.vocabulary import LabelError

PREFIX = "/v1"
STREAM = {
    "text/event-stream": {
        "schema": {"type": "object", "properties": {name: {"type": "string"} for name in ("event", "data")}},
        "example": {
            "event": "image_generation.completed",
            "data": '{"type": "image_generation.completed", "index": 0}',
        },
    }
}
MAX_SCALED = 2  # parts of pictures that are scaled at the same time
router = APIRouter(prefix=PREFIX, tags=["openai"])

# OpenAI's clients repeat a request after a 409, 500 or 504. If its job was cancelled, has failed or goes on, that would
# only create another one.
NO_RETRY = {"X-Should-Retry": "false"}


@router.post(
    "/images/generations",
    response_model=Images,
    responses={200: {"content": STREAM}, **problems(*ERRORS, NotInTime)},
    summary="Generate pictures with OpenAI's images API",
)
async def generate_images(request: Request, body: ImagesRequest, submitter: SubmitterDep) -> Response:
    """Reads the labels from the prompt; for a word that is no label, the error suggests the nearest one."""
    _check_size(body)
    job_id = await submitter.submit("generate", body, [], partial(_check, body))  # the prompt has the labels
    if body.stream:
        return await _stream(request, body, submitter, job_id)
    wait_s = submitter.service.settings.wait_s
    job = await submitter.wait(job_id, wait_s)
    if job.status not in TERMINAL:
        detail = f"not finished within {wait_s:.0f} s; the job goes on"
        raise NotInTime(detail, headers=NO_RETRY, job=f"/jobs/{job_id}")
    if job.result is None:
        raise why_unfinished(job, NO_RETRY)
    png = await submitter.service.results.image(job.id, submitter.owner, 0)
    with PictureFile.open(io.BytesIO(png)) as first:
        images = _images(request, body, submitter, job, first.size)
    return CutStream(images, media_type="application/json")


async def _stream(request: Request, body: ImagesRequest, submitter: Submitter, job_id: str) -> Response:
    job = await submitter.service.jobs.job(job_id)
    info = (await submitter.service.catalog.models()).with_digest(job.digest)
    events = ImageStream(body, submitter, job, request.app.state.scaling, picture_size(info.config))
    return CutStream(aiter(events), media_type="text/event-stream", headers=HEADERS)


async def _images(
    request: Request, body: ImagesRequest, submitter: Submitter, job: Job, own: Size
) -> AsyncIterator[str]:
    """Yield the JSON of a finished job's pictures, one after the other: ten large ones would fill the memory."""
    size = size_of(own, body.size)
    assert job.seed is not None  # only jobs that score uploaded pictures have none
    about = Images(
        created=_unix_time(job.finished_at or job.created_at), data=[], size=f"{size[0]}x{size[1]}",
        sampled_size=f"{own[0]}x{own[1]}", seed=job.seed, job=f"/jobs/{job.id}",
    )  # fmt: skip
    before, data, after = about.model_dump_json().partition('"data":[')
    yield before + data
    for i, labels in enumerate(job.labels):
        yield "," if i else ""
        image = Image(revised_prompt=", ".join(labels))
        if body.response_format == "url":
            where = f"v1/images/{job.id}/{i}/{size[0]}x{size[1]}.png"
            image.url = f"{request.base_url}{f'jobs/{job.id}/images/{i}.png' if size == own else where}"
            yield image.model_dump_json(exclude_none=True)
            continue
        image.b64_json = ""
        png = await submitter.service.results.image(job.id, submitter.owner, i)
        parts = one_by_one(scaled(png, size), request.app.state.scaling, submitter.owner)
        async for part in with_base64(image.model_dump_json(exclude_none=True), parts):
            yield part
    yield after


@router.get(
    "/images/{job_id}/{index}/{size}.png",
    response_class=Response,
    responses={
        200: {"content": PNG, "description": "The picture"},
        **problems(UnknownJob, ExpiredJob, Unavailable, NotReady, UnknownPicture),
    },
    summary="Read a picture at another size",
)
async def read_scaled_image(
    request: Request, job_id: OwnJob, owner: OwnerDep, index: Index, service: ServiceDep,
    size: Annotated[str, Path(
            max_length=20, description="width and height in pixels", examples=["1024x768"],
            json_schema_extra={"pattern": f"^{PATTERN}$"},
        )],
) -> Response:  # fmt: skip
    """A picture of a job, scaled to exactly this size. `GET /jobs/{id}/images/{index}.png` has it as it was sampled."""
    try:
        wanted = parse_size(size)
    except ValueError as error:
        raise BadRequest.at(("path", "size"), str(error)) from error
    png = await service.results.image(job_id, owner, index)
    return CutStream(one_by_one(scaled(png, wanted), request.app.state.scaling, owner), media_type="image/png")


def _check_size(body: ImagesRequest) -> None:
    """BadRequest for a size that cannot be read, and for pictures that are too large for one answer together."""
    if body.size in (None, "auto"):
        return
    try:
        pixels = math.prod(parse_size(body.size)) * (body.n or 1)
    except ValueError as error:
        raise BadRequest.at(("body", "size"), f"{error}, or auto") from error
    at_once = body.response_format != "url" and not body.stream  # else they are fetched, or sent, one by one
    if at_once and pixels > MOST_PIXELS:
        detail = f"{body.n or 1} pictures of {body.size} have {pixels} pixels; at most {MOST_PIXELS} are allowed"
        raise BadRequest.at(("body", "size"), f"{detail} in one answer, or response_format url")


def _check(body: ImagesRequest, models: Models) -> JobSpec:
    """Check the request against the models. Raises BadRequest, NoModel."""
    info = models.find(body.model)
    try:
        labels = parse_prompt(body.prompt, info.labels)
    except LabelError as error:
        raise BadRequest.from_label_error(error, "prompt") from error
    if problem := info.support.count_problem(len(labels)):
        raise not_learnt(problem, info, ("body", "prompt"), 0)
    return JobSpec([labels] * (body.n or 1), info)


def _unix_time(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp())


def _model(info: CheckpointInfo) -> OpenAIModel:
    return OpenAIModel(id=info.name, created=_unix_time(info.created_at))


@router.get("/models", responses=problems(), summary="List the models in OpenAI's format")
async def list_openai_models(models: ModelsDep, owner: OwnerDep) -> OpenAIModels:
    """The models of GET /models, each with its name and creation time only."""
    return OpenAIModels(data=[_model(info) for info in models.denoisers])


@router.get("/models/{model}", responses=problems(NotFound), summary="Show a model in OpenAI's format")
async def read_openai_model(
    model: Annotated[str, Path(max_length=100, description="a model's name", examples=["base"])],
    models: ModelsDep,
    owner: OwnerDep,
) -> OpenAIModel:
    """A model of the list at /v1/models."""
    for info in models.denoisers:
        if info.name == model:
            return _model(info)
    raise NotFound(f"there is no model {model!r}")


def mount(app: DocumentedAPI) -> None:
    """Add these routes, and OpenAI's form of errors to theirs."""
    app.include_router(router)
    app.state.scaling = Slots(MAX_SCALED)
    app.dialects[f"{PREFIX}/"] = with_openai_error
    app.problem_models.append(OpenAIProblem)
