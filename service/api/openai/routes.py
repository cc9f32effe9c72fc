"""/v1: OpenAI's images and models API, for clients written for it. docs/openai.md."""

import base64
import struct
from datetime import datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from service.api.catalog import Models, vocabulary_of
from service.api.dependencies import ModelsDep, OwnerDep, SettingsDep
from service.api.openai.prompt import parse_prompt
from service.api.openai.schemas import Image, Images, ImagesRequest, OpenAIModel, OpenAIModels
from service.api.openapi_parts import link, problems
from service.api.submitter import ERRORS, JobSpec, SubmitterDep, check_finished
from service.contract.errors import BadRequest, NotFound, NotInTime
from service.contract.records import TERMINAL
from service.contract.schemas import Job
from service.store.reader import JobReader
from shared.checkpoint import CheckpointInfo
from shared.vocabulary import LabelError

router = APIRouter(prefix="/v1", tags=["openai"])


def _size_of(png: bytes) -> str:
    """Return a PNG's size as OpenAI writes it, from its header, the first 24 bytes."""
    width, height = struct.unpack(">II", png[16:24])
    return f"{width}x{height}"


def _check_size(body: ImagesRequest, info: CheckpointInfo) -> None:
    """Raise BadRequest for any size but the model's own. Pictures are not scaled: scores are about their pixels."""
    side = info.config.get("network", {}).get("image_size")
    if body.size not in (None, "auto", f"{side}x{side}"):
        message = f"{body.size}; wanted {side}x{side}, the size of model {info.name}, or auto"
        raise BadRequest.at(("body", "size"), message)


@router.post(
    "/images/generations",
    response_model=Images,
    responses=problems(*ERRORS, NotInTime),
    summary="Generate pictures with OpenAI's images API",
)
async def generate_images(
    request: Request, body: ImagesRequest, submitter: SubmitterDep, settings: SettingsDep
) -> Response:
    """Reads the labels from the prompt; for a word that is no label, the error suggests the nearest one."""
    job_id = await submitter.submit("generate", body, [], partial(_check, body))  # the prompt has the labels
    job = await submitter.wait(job_id, settings.wait_s)
    if job.status not in TERMINAL:
        raise NotInTime(f"not finished within {settings.wait_s:.0f} s; the job goes on", job=f"/jobs/{job_id}")
    check_finished(job)
    base = None if body.response_format != "url" else str(request.base_url).rstrip("/")
    images = await _images(submitter.reader, job, base)
    return Response(images.model_dump_json(exclude_none=True), media_type="application/json")


def _check(body: ImagesRequest, models: Models) -> JobSpec:
    """Check the request against the models. Raises BadRequest, NoModel."""
    info = models.find(body.model)
    _check_size(body, info)
    try:
        labels = parse_prompt(body.prompt, vocabulary_of(info))
    except LabelError as error:
        raise BadRequest.from_label_error(error, "prompt") from error
    return JobSpec([labels] * (body.n or 1), info)


async def _images(reader: JobReader, job: Job, base: str | None) -> Images:
    """Return the pictures of a finished job, or their addresses under `base`."""
    pngs = [await reader.image(job.id, i) for i in range(len(job.labels))]
    data = []
    for i, (labels, png) in enumerate(zip(job.labels, pngs, strict=True)):
        image = Image(revised_prompt=", ".join(labels))
        if base is None:
            image.b64_json = base64.b64encode(png).decode()
        else:
            image.url = f"{base}/jobs/{job.id}/images/{i}.png"
        data.append(image)
    assert job.seed is not None  # only jobs that score uploaded pictures have none
    created = _unix_time(job.finished_at or job.created_at)
    return Images(created=created, data=data, size=_size_of(pngs[0]), seed=job.seed, job=f"/jobs/{job.id}")


def _unix_time(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp())


def _model(info: CheckpointInfo) -> OpenAIModel:
    return OpenAIModel(id=info.name, created=_unix_time(info.created_at))


@router.get(
    "/models",
    responses={200: {"links": {"model": link("read_openai_model", "one of them", model="$response.body#/data/0/id")}}},
    summary="List the models in OpenAI's format",
)
def list_openai_models(models: ModelsDep, owner: OwnerDep) -> OpenAIModels:
    """The models of GET /models, each with its name and creation time only."""
    return OpenAIModels(data=[_model(info) for info in models.listing().denoisers])


@router.get("/models/{model}", responses=problems(NotFound), summary="Show a model in OpenAI's format")
def read_openai_model(
    model: Annotated[str, Path(max_length=100, description="a model's name", examples=["base"])],
    models: ModelsDep,
    owner: OwnerDep,
) -> OpenAIModel:
    """A model of the list at /v1/models."""
    found = [info for info in models.listing().denoisers if info.name == model]
    if not found:
        raise NotFound(f"there is no model {model!r}")
    return _model(found[0])
