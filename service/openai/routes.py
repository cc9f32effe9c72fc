"""/v1: OpenAI's images and models API, for clients written for it. docs/api.md."""

import base64
import io
from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from PIL import Image as PictureFile

from service.api import openapi
from service.api.answers import retry_after, wait, why_unfinished
from service.api.dependencies import IDEMPOTENCY_KEY, Caller, CallerDep, ModelsDep
from service.api.openapi import Dialect, DocumentedAPI
from service.api.results import CutStream
from service.api.submit import ERRORS, create, new_record, same_request
from service.contract.checks import not_learnt
from service.contract.errors import BadRequest, NotFound, NotInTime
from service.contract.records import TERMINAL
from service.contract.schemas import GenerateResult, Job
from service.openai.prompt import parse_prompt
from service.openai.schemas import Image, Images, ImagesRequest, OpenAIModel, OpenAIModels, OpenAIProblem
from shared.checkpoint import CheckpointInfo
from shared.vocabulary import LabelError

PREFIX = "/v1"
INVALID, OPENAIS_INVALID = 422, 400  # the statuses of an invalid request: the service's and OpenAI's
router = APIRouter(prefix=PREFIX, tags=["openai"])

# OpenAI's clients repeat a request after a 409, 500 or 504. If its job was cancelled, has failed or goes on, that would
# only create another one.
NO_RETRY = {"X-Should-Retry": "false"}


def with_openai_error(problem: dict[str, Any]) -> dict[str, Any]:
    """Add OpenAI's `error` member to a problem, with OpenAI's status for an invalid request."""
    status = OPENAIS_INVALID if problem["status"] == INVALID else problem["status"]
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    loc: list[str | int] = next((error["loc"] for error in problem.get("errors", [])), [])
    error = {
        "message": problem["detail"],
        "type": kind,
        "param": str(loc[1]) if len(loc) > 1 else None,
        "code": problem["type"].rpartition(":")[2].replace("-", "_"),
    }
    return {**problem, "status": status, "error": error}


OPENAI = Dialect(f"{PREFIX}/", with_openai_error, OpenAIProblem)
problems = partial(openapi.problems, dialect=OPENAI)


@router.post(
    "/images/generations",
    response_model=Images,
    responses=problems(*ERRORS, NotInTime),
    openapi_extra={"parameters": [IDEMPOTENCY_KEY]},
    summary="Generate pictures with OpenAI's images API",
)
async def generate_images(body: ImagesRequest, caller: CallerDep) -> Response:
    """Reads the labels from the prompt; for a word that is no label, the error suggests the nearest one."""
    service = caller.service
    same = same_request(caller, "generate", body, [])  # the prompt has the labels
    job_id = await service.jobs.known(same)
    if job_id is None:
        info = (await service.catalog.models()).find(body.model)
        try:
            labels = parse_prompt(body.prompt, info.labels)
        except LabelError as error:
            raise BadRequest.from_label_error(error, "prompt") from error
        if problem := info.support.count_problem(len(labels)):
            raise not_learnt(problem, info, ("body", "prompt"), 0)
        record = await new_record(caller, "generate", body, info, [labels] * (body.n or 1))
        job_id = await create(service, record, same)
    wait_s = service.settings.wait_s
    await wait(caller, job_id, wait_s)
    job = await service.jobs.job(job_id)
    if job.status not in TERMINAL:
        detail = f"not finished within {wait_s:.0f} s; the job goes on"
        raise NotInTime(detail, headers={**NO_RETRY, **await retry_after(service, job)}, job=f"/jobs/{job_id}")
    if job.result is None:
        raise why_unfinished(job, NO_RETRY)
    png = await service.results.image(job.id, caller.owner, 0)
    with PictureFile.open(io.BytesIO(png)) as first:
        size = first.size
    return CutStream(_images(body, caller, job, size), media_type="application/json")


async def _images(body: ImagesRequest, caller: Caller, job: Job, size: tuple[int, int]) -> AsyncIterator[str]:
    """Yield the JSON of a finished job's pictures. Where a client does not read, one picture waits in memory."""
    assert job.seed is not None  # only jobs that score uploaded pictures have none
    assert isinstance(job.result, GenerateResult)
    answer = Images(
        created=_unix_time(job.finished_at or job.created_at),
        data=[],
        size="{}x{}".format(*size),
        seed=job.seed,
        selected=job.result.selected,
        job=f"/jobs/{job.id}",
    )
    before, after = answer.model_dump_json().split("[]")
    yield before + "["
    for i, labels in enumerate(job.labels):
        image, picture = Image(revised_prompt=", ".join(labels)), job.result.pictures[i]
        if picture.attempts:
            image.exact, image.attempts = picture.exact, len(picture.attempts)
        if body.response_format == "url":
            image.url = f"{caller.request.base_url}jobs/{job.id}/images/{i}.png"
        else:
            png = await caller.service.results.image(job.id, caller.owner, i)
            image.b64_json = base64.b64encode(png).decode()
        yield ("," if i else "") + image.model_dump_json(exclude_none=True)
    yield "]" + after


def _unix_time(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp())


def _model(info: CheckpointInfo) -> OpenAIModel:
    return OpenAIModel(id=info.name, created=_unix_time(info.created_at))


@router.get("/models", responses=problems(), summary="List the models in OpenAI's format")
async def list_openai_models(models: ModelsDep) -> OpenAIModels:
    """The models of GET /models, each with its name and creation time only."""
    return OpenAIModels(data=[_model(info) for info in models.denoisers])


@router.get("/models/{model}", responses=problems(NotFound), summary="Show a model in OpenAI's format")
async def read_openai_model(
    model: Annotated[str, Path(max_length=100, description="a model's name", examples=["base"])],
    models: ModelsDep,
) -> OpenAIModel:
    """A model of the list at /v1/models."""
    for info in models.denoisers:
        if info.name == model:
            return _model(info)
    raise NotFound(f"there is no model {model!r}")


def mount(app: DocumentedAPI) -> None:
    """Add these routes, and OpenAI's form of errors to theirs."""
    app.include_router(router)
    app.dialects.append(OPENAI)
