"""/v1: the images and models of the OpenAI API, so that its clients work here as they are. docs/openai.md."""

import base64
import contextlib
import json
import struct
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from redis.exceptions import RedisError

from service.api.catalog import vocabulary_of
from service.api.dependencies import FeedsDep, ModelsDep, OwnerDep, ReaderDep, SettingsDep, StoreDep
from service.api.event_feed import EVENT_STREAM_HEADERS, Feeds
from service.api.openai.errors import error_of
from service.api.openai.prompt import parse_prompt
from service.api.openai.schemas import (
    CompletedImage,
    Image,
    Images,
    ImagesRequest,
    OpenAIModel,
    OpenAIModels,
    PartialImage,
    StreamError,
)
from service.api.openapi import event_stream, link, problems
from service.api.preferences import Wishes
from service.api.submitter import ERRORS, IdempotencyKey, JobSpec, Submitter, check_finished
from service.contract.errors import BadRequest, NotFound, NotInTime, ServiceError, ShuttingDown, Unavailable
from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.store.reader import JobReader
from shared.checkpoint import CheckpointInfo
from shared.vocabulary import LabelError

router = APIRouter(prefix="/v1", tags=["openai"])

STREAM_EXAMPLES = (
    {
        "event": "image_generation.partial_image",
        "data": PartialImage(
            b64_json="iVBORw0KGgo=", created_at=1767268800, size="64x64", partial_image_index=0
        ).model_dump_json(),
    },
    {
        "event": "image_generation.completed",
        "data": CompletedImage(b64_json="iVBORw0KGgo=", created_at=1767268801, size="64x64").model_dump_json(),
    },
)
STREAM: dict[str, type[BaseModel]] = {
    "image_generation.partial_image": PartialImage,
    "image_generation.completed": CompletedImage,
    "error": StreamError,
}


def _submitter(
    request: Request,
    settings: SettingsDep,
    store: StoreDep,
    reader: ReaderDep,
    models: ModelsDep,
    owner: OwnerDep,
    idempotency_key: IdempotencyKey = None,
) -> Submitter:
    wishes = Wishes(wait_s=settings.wait_s, png=False, applied=None)
    return Submitter(request, settings, store, reader, models, wishes, idempotency_key, owner)


def _size_of(png: bytes) -> str:
    """A PNG's size as OpenAI writes it; its header is a PNG's first 24 bytes."""
    width, height = struct.unpack(">II", png[16:24])
    return f"{width}x{height}"


def _check_size(body: ImagesRequest, info: CheckpointInfo) -> None:
    """BadRequest for a size that the model does not make: nothing is scaled, for a verdict is about these pixels."""
    side = info.config.get("network", {}).get("image_size")
    if body.size not in (None, "auto", f"{side}x{side}"):
        raise BadRequest.at(("body", "size"), f"{body.size}; the model {info.name} makes {side}x{side}, as does auto")


def _check_stream(body: ImagesRequest) -> None:
    if body.stream and (body.n or 1) > 1:
        raise BadRequest.at(("body", "n"), f"{body.n}; a stream has one picture")
    if body.stream and body.response_format == "url":
        raise BadRequest.at(("body", "response_format"), "url; a stream has its pictures in it, as b64_json")


@router.post(
    "/images/generations",
    response_model=Images,
    responses={
        200: {
            "description": "The pictures; with `stream` events of `image_generation.partial_image` and `.completed`",
            "content": event_stream(STREAM, *STREAM_EXAMPLES),
        },
        **problems(*ERRORS, NotInTime),
    },
    summary="Make pictures as with OpenAI's images API",
)
async def generate_images(
    request: Request, body: ImagesRequest, submitter: Annotated[Submitter, Depends(_submitter)], feeds: FeedsDep
) -> Response:
    """The labels are read from the prompt; words that are none are an error which says what was meant."""
    _check_stream(body)
    asked = submitter.asked("generate", body, [])  # the prompt says the labels
    job_id = await submitter.standing(asked) or await submitter.create(await _spec(body, submitter), asked)
    if body.stream:
        stream = _stream(feeds, job_id, body.partial_images or 0)
        return StreamingResponse(stream, media_type="text/event-stream", headers=EVENT_STREAM_HEADERS)
    job = await submitter.wait(job_id)
    if job.status not in TERMINAL:
        raise NotInTime(f"not finished within {submitter.wishes.wait_s:.0f} s; the job goes on", job=f"/jobs/{job_id}")
    check_finished(job)
    base = None if body.response_format != "url" else str(request.base_url).rstrip("/")
    images = await _images(submitter.reader, job, base)
    return Response(images.model_dump_json(exclude_none=True), media_type="application/json")


async def _spec(body: ImagesRequest, submitter: Submitter) -> JobSpec:
    """What is asked for, checked. BadRequest, NoModel."""
    info = await submitter.model(body.model)
    _check_size(body, info)
    try:
        labels = parse_prompt(body.prompt, vocabulary_of(info))
    except LabelError as error:
        raise BadRequest.from_label_error(error, "prompt") from error
    return JobSpec("generate", body, [labels] * (body.n or 1), info)


def _created(job: Job) -> int:
    return int(datetime.fromisoformat(job.finished_at or job.created_at).timestamp())


async def _images(reader: JobReader, job: Job, base: str | None) -> Images:
    """The pictures of a finished job, or their addresses under `base`."""
    pngs = [await reader.image(job.id, i) for i in range(len(job.labels))]
    data = []
    for i, (labels, png) in enumerate(zip(job.labels, pngs, strict=True)):
        image = Image(revised_prompt=", ".join(labels))
        if base is None:
            image.b64_json = base64.b64encode(png).decode()
        else:
            image.url = f"{base}/jobs/{job.id}/images/{i}.png"
        data.append(image)
    assert job.seed is not None  # of pictures that were made
    return Images(created=_created(job), data=data, size=_size_of(pngs[0]), seed=job.seed, job=f"/jobs/{job.id}")


async def _stream(feeds: Feeds, job_id: str, wanted: int) -> AsyncIterator[bytes]:
    """Up to `wanted` previews, evenly over the steps, then the picture, or an error."""
    sent = 0
    try:
        async with contextlib.aclosing(feeds.happenings(job_id, "0-0")) as happenings:
            async for told in happenings:
                if told is None:
                    yield b": wait\n\n"
                elif told.name == "steps" and sent < wanted:
                    steps = told.data["pictures"][0]
                    if "preview" in steps and steps["step"] / steps["steps"] >= (sent + 1) / (wanted + 1):
                        preview = steps["preview"].partition(",")[2]
                        size = _size_of(base64.b64decode(preview))
                        partial = PartialImage(
                            b64_json=preview, created_at=int(time.time()), size=size, partial_image_index=sent
                        )
                        yield format_sse_event(event=partial.type, data_str=partial.model_dump_json())
                        sent += 1
                elif told.name == "end":
                    break
            else:
                if feeds.reader.deadline_passed:
                    raise ShuttingDown(f"the job goes on and can be read at /jobs/{job_id}")
        yield await _last(feeds.reader, job_id)  # also where no end was told: this says why
    except ServiceError as error:
        yield _error(error)
    except RedisError:
        yield _error(Unavailable(f"Redis does not answer; the job can be read at /jobs/{job_id}"))


async def _last(reader: JobReader, job_id: str) -> bytes:
    """The finished picture. UnknownJob, ExpiredJob, JobFailed, JobCancelled, NotReady."""
    job = await reader.job(job_id)
    check_finished(job)
    png = await reader.image(job_id, 0)
    image = base64.b64encode(png).decode()
    completed = CompletedImage(b64_json=image, created_at=_created(job), size=_size_of(png))
    return format_sse_event(event=completed.type, data_str=completed.model_dump_json())


def _error(error: ServiceError) -> bytes:
    problem = {"type": error.slug, "status": error.status, "detail": error.detail}
    return format_sse_event(event="error", data_str=json.dumps({"error": error_of(problem)}))


def _model(info: CheckpointInfo) -> OpenAIModel:
    return OpenAIModel(id=info.name, created=int(datetime.fromisoformat(info.created_at).timestamp()))


@router.get(
    "/models",
    responses={200: {"links": {"model": link("read_openai_model", "one of them", model="$response.body#/data/0/id")}}},
    summary="The models, as OpenAI lists them",
)
def list_openai_models(models: ModelsDep, owner: OwnerDep) -> OpenAIModels:
    """Those of GET /models, by name and time alone."""
    return OpenAIModels(data=[_model(info) for info in models.listing().denoisers])


@router.get("/models/{model}", responses=problems(NotFound), summary="A model, as OpenAI describes it")
def read_openai_model(
    model: Annotated[str, Path(max_length=100, description="a model's name", examples=["base"])],
    models: ModelsDep,
    owner: OwnerDep,
) -> OpenAIModel:
    """One of those that /v1/models lists."""
    found = [info for info in models.listing().denoisers if info.name == model]
    if not found:
        raise NotFound(f"there is no model {model!r}")
    return _model(found[0])
