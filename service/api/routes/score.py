"""POST /score: the scores of repeated runs over a test file, or of uploaded pictures."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from service.api.catalog import Finder
from service.api.jobs.spec import JobSpec
from service.api.jobs.submitter import ERRORS, READS_AND_ANSWERS, RESPONSES, Accepted, Submitter, submitter_of
from service.api.openapi_parts import problems
from service.api.uploads.body import describe_body, describe_form, opened_body, validate
from service.api.uploads.picture_zip import PICTURES, read_submission
from service.contract.errors import BadForm, BadRequest, TooLarge, UnsupportedBody
from service.contract.schemas import Job, ScoreFields, ScoreRequest
from service.settings import Settings
from shared.options import LIMITS
from shared.vocabulary import LabelError, parse_label_lists

router = APIRouter(tags=["pictures"])

FILE = "file"
BESIDE_PICTURES = ("model", "columns", "webhook", "webhook_events")  # the fields that do not concern sampling
BODY = describe_body(
    {
        "schema": ScoreRequest.model_json_schema(),
        "examples": {"file as JSON": {"value": ScoreRequest.model_config["json_schema_extra"]["examples"][0]}},  # type: ignore[index]
    },
    {
        **describe_form(
            {
                FILE: ("application/json", "the test file"),
                PICTURES: (
                    "application/zip",
                    "PNGs to score instead of sampling any, named in the test file's order: 0.png, 1.png, ...",
                ),
            },
            ScoreFields.model_json_schema()["properties"],
            dependentSchemas={PICTURES: {"propertyNames": {"enum": [FILE, PICTURES, *BESIDE_PICTURES]}}},
        ),
        "examples": {"a test file": {"value": {FILE: '[["gray cube"], ["red cube", "blue sphere"]]', "repeats": 10}}},
    },
)


@router.post(
    "/score",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, BadForm, UnsupportedBody)},
    openapi_extra={**BODY, **READS_AND_ANSWERS},
    summary="Score the model on a test file",
)
async def score(request: Request) -> Response:
    """Generates every picture of a test file `repeats` times, run r with seed + r, and scores each run.

    With a zip of `pictures` it generates none and scores those, as one run, by the evaluator of `model`.
    """
    submitter = submitter_of(request)
    return await submitter.answer(await _submit(request, submitter))


@dataclass(frozen=True)
class Body:
    """The request: its options, its label lists with the field that has them, and the pictures uploaded with them."""

    fields: ScoreFields
    lists: list[list[str]]
    lists_field: str
    pictures: list[bytes] | None = None


async def _submit(request: Request, submitter: Submitter) -> Accepted:
    """Create the job. A function of its own, so that nothing keeps the pictures while the request waits."""
    async with opened_body(request, FILE, PICTURES) as (content, files):
        few: AbstractAsyncContextManager[None] = nullcontext()
        if PICTURES in files:
            await submitter.rate()  # no zip is unpacked that no worker would judge
            few = submitter.uploads.of(submitter.owner)
        async with few:
            body = await _read(content, files, submitter.settings)
            check = partial(_check, body)
            return await submitter.submit("score", body.fields, body.lists, check, body.pictures or ())


async def _read(content: Any, files: Mapping[str, UploadFile], settings: Settings) -> Body:
    if not files:
        as_json = validate(ScoreRequest, content)
        return Body(as_json, as_json.conditions, "conditions")
    fields = validate(ScoreFields, content)
    if (files[FILE].size or 0) > LIMITS.max_file_bytes:
        raise TooLarge(f"the file `{FILE}` has more than {LIMITS.max_file_bytes} bytes")
    content = await files[FILE].read()
    if content.count(b"[") + content.count(b"{") > LIMITS.max_parts:  # before Python creates an object for each
        raise TooLarge(f"the file `{FILE}` has more than {LIMITS.max_parts} lists and objects")
    try:
        lists = parse_label_lists(content, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, FILE) from error
    if PICTURES not in files:
        return Body(fields, lists, FILE)
    if unused := sorted(fields.model_fields_set.difference(BESIDE_PICTURES)):
        raise BadRequest.at(("body", unused[0]), "has no effect on uploaded pictures; leave it out")
    pngs = await run_in_threadpool(read_submission, await files[PICTURES].read(), len(lists), settings)
    return Body(fields, lists, FILE, pngs)


def _check(body: Body, models: Finder) -> JobSpec:
    """Check the request against the models. Raises BadRequest, NoModel."""
    sampled = body.pictures is None
    info = models.find(body.fields.model) if sampled else models.find_evaluator(body.fields.model)
    try:
        labels = info.labels.check(body.lists, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, body.lists_field) from error
    repeats = body.fields.repeats if sampled else 1
    return JobSpec(labels, info, repeats, at=("body", body.lists_field))
