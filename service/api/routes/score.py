"""POST /score: the scores of repeated runs over a test file, or of uploaded pictures."""

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Form, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from pydantic import ConfigDict, Field

from service.api.catalog import Models
from service.api.jobs.preferences import PreferencesDep
from service.api.jobs.spec import JobSpec
from service.api.jobs.submitter import ERRORS, RESPONSES, Accepted, Submitter, SubmitterDep
from service.api.openapi import problems
from service.api.uploads.picture_zip import read_submission
from service.contract.errors import BadForm, BadRequest, TooLarge
from service.contract.schemas import Job, ScoreFields, ScoreRequest
from service.settings import Settings
from shared.options import LIMITS
from shared.vocabulary import LabelError, parse_label_lists

router = APIRouter(tags=["pictures"])

BESIDE_PICTURES = {"model", "columns", "webhook", "webhook_events"}  # the fields that do not concern sampling


class ScoreForm(ScoreFields):
    """A test file, and what to do with it. A list is a field that is given several times."""

    model_config = ConfigDict(
        strict=False,  # a form's values are text
        json_schema_extra={"examples": [{"file": '[["gray cube"], ["red cube", "blue sphere"]]', "repeats": 10}]},
    )

    file: UploadFile = Field(description="the test file: a JSON list of label lists")
    pictures: UploadFile | None = Field(
        None,
        description="a zip of PNGs to score instead of sampling any, in the test file's order: 0.png, 1.png, ...; "
        f"beside it only {', '.join(sorted(BESIDE_PICTURES))}",
    )


@router.post(
    "/score",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, BadForm)},
    summary="Score the model on a test file",
)
async def score(
    form: Annotated[ScoreForm, Form(media_type="multipart/form-data")],
    submitter: SubmitterDep,
    preferences: PreferencesDep,
) -> Response:
    """Generates every picture of a test file `repeats` times, run r with seed + r, and scores each run.

    With a zip of `pictures` it generates none and scores those, as one run, by the evaluator of `model`.
    """
    return await submitter.answer(await _submit_form(form, submitter), preferences)


@router.post(
    "/score/conditions",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS)},
    summary="Score the model on label lists",
)
async def score_conditions(body: ScoreRequest, submitter: SubmitterDep, preferences: PreferencesDep) -> Response:
    """The same as `POST /score` for a program, which has the content of the test file as JSON."""
    accepted = await _submit(Body(body, body.conditions, "conditions"), submitter)
    return await submitter.answer(accepted, preferences)


@dataclass(frozen=True)
class Body:
    """The request: its options, its label lists with the field that has them, and the pictures uploaded with them."""

    fields: ScoreFields
    lists: list[list[str]]
    lists_field: str
    pictures: list[bytes] | None = None


async def _submit_form(form: ScoreForm, submitter: Submitter) -> Accepted:
    """Create the job. A function of its own, so that nothing keeps the pictures while the request waits."""
    few: AbstractAsyncContextManager[None] = nullcontext()
    if form.pictures is not None:
        await submitter.rate()  # no zip is unpacked that no worker would judge
        few = submitter.uploads.of(submitter.owner)
    async with few:
        return await _submit(await _read(form, submitter.settings), submitter)


async def _submit(body: Body, submitter: Submitter) -> Accepted:
    return await submitter.submit("score", body.fields, body.lists, partial(_check, body), body.pictures or ())


async def _read(form: ScoreForm, settings: Settings) -> Body:
    fields = ScoreFields.model_validate(form.model_dump(exclude={"file", "pictures"}, exclude_unset=True))
    if (form.file.size or 0) > LIMITS.max_file_bytes:
        raise TooLarge(f"the file `file` has more than {LIMITS.max_file_bytes} bytes")
    content = await form.file.read()
    if content.count(b"[") + content.count(b"{") > LIMITS.max_parts:  # before Python creates an object for each
        raise TooLarge(f"the file `file` has more than {LIMITS.max_parts} lists and objects")
    try:
        lists = parse_label_lists(content, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, "file") from error
    if form.pictures is None:
        return Body(fields, lists, "file")
    if unused := sorted(fields.model_fields_set - BESIDE_PICTURES):
        raise BadRequest.at(("body", unused[0]), "has no effect on uploaded pictures; leave it out")
    pngs = await run_in_threadpool(read_submission, await form.pictures.read(), len(lists), settings)
    await form.pictures.close()
    return Body(fields, lists, "file", pngs)


def _check(body: Body, models: Models) -> JobSpec:
    """Check the request against the models. Raises BadRequest, NoModel."""
    sampled = body.pictures is None
    info = models.find(body.fields.model) if sampled else models.find_evaluator(body.fields.model)
    try:
        labels = info.labels.check(body.lists, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, body.lists_field) from error
    repeats = body.fields.repeats if sampled else 1
    return JobSpec(labels, info, repeats, at=("body", body.lists_field))
