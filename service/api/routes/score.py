"""POST /score: a test file in, the scores of repeated runs over it out, or of pictures that are sent with it."""

import json
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from service.api.catalog import vocabulary_of
from service.api.openapi import form, problems
from service.api.submitter import ERRORS, RESPONSES, JobSpec, Submitter, SubmitterDep
from service.api.uploads.multipart import read_form
from service.api.uploads.picture_zip import SubmissionError, read_submission
from service.contract.errors import BadForm, BadRequest, NotJson, ServiceError
from service.contract.schemas import Job, ScoreFields, ScoreRequest
from shared.options import LIMITS
from shared.vocabulary import LabelError, Vocabulary, parse_any_lists

router = APIRouter(tags=["pictures"])

FILE, PICTURES = "file", "pictures"
BESIDE_PICTURES = ("columns", "webhook", "webhook_events")  # the fields that say nothing of how pictures are made


class UnsupportedBody(ServiceError):
    status, slug, title = 415, "unsupported-media-type", "The body's type is not supported"
    example = "text/plain: wanted multipart/form-data or application/json"


@dataclass(frozen=True)
class Form:
    """What a form brings: its fields, the test file's lists, and the zip of pictures if there is one."""

    fields: ScoreFields
    lists: list[list[str]]
    pictures: bytes | None


OPENAPI = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                **form(
                    {
                        FILE: ("application/json", "the test file"),
                        PICTURES: (
                            "application/zip",
                            "PNGs named in the file's order, 0.png, 1.png, ...: they are scored, none is made",
                        ),
                    },
                    ScoreFields.model_json_schema()["properties"],
                    dependentSchemas={PICTURES: {"propertyNames": {"enum": [FILE, PICTURES, *BESIDE_PICTURES]}}},
                ),
                "examples": {
                    "a test file": {"value": {FILE: '[["gray cube"], ["red cube", "blue sphere"]]', "repeats": 10}}
                },
            },
            "application/json": {
                "schema": ScoreRequest.model_json_schema(),
                "examples": {"file as JSON": {"value": ScoreRequest.model_config["json_schema_extra"]["examples"][0]}},  # type: ignore[index]
            },
        },
    }
}


@router.post(
    "/score",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, BadForm, UnsupportedBody)},
    openapi_extra=OPENAPI,
    summary="Score the model on a test file",
)
async def score(request: Request, submitter: SubmitterDep) -> Response:
    """Makes every picture of a test file `repeats` times, run r with seed + r, and scores each run.

    With a zip of `pictures` none is made: those are scored, as one run.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        form = await _read_form(request)
        if form.pictures is not None:
            return await _score_sent(form.fields, form.lists, form.pictures, submitter)
        fields, lists, field = form.fields, form.lists, FILE
    elif content_type == "application/json":
        fields, lists = await _read_json(request)
        field = "conditions"
    else:
        raise UnsupportedBody(f"{content_type or 'no type'}: wanted multipart/form-data or application/json")
    asked = submitter.asked("score", fields, lists)
    if standing := await submitter.standing(asked):
        return await submitter.answer(standing)
    info = await submitter.model(fields.model)
    labels = _check(lists, vocabulary_of(info), field)
    return await submitter.submit(JobSpec("score", fields, labels, info, fields.repeats), asked)


async def _score_sent(fields: ScoreFields, lists: list[list[str]], pictures: bytes, submitter: Submitter) -> Response:
    if more := sorted(fields.model_fields_set.difference(BESIDE_PICTURES)):
        raise BadRequest.at(("body", more[0]), "of no use with pictures, of which none is made")
    try:
        pngs = await run_in_threadpool(read_submission, pictures, len(lists), submitter.settings)
    except SubmissionError as error:
        places = [["body", PICTURES, *([] if one.entry is None else [one.entry])] for one in error.faults]
        raise BadRequest.from_errors(
            [{"loc": at, "msg": one.message, "type": "zip"} for at, one in zip(places, error.faults, strict=True)]
        ) from error
    asked = submitter.asked("score", fields, lists, pngs)
    if standing := await submitter.standing(asked):
        return await submitter.answer(standing)
    judge = await submitter.evaluator()
    labels = _check(lists, vocabulary_of(judge), FILE)
    return await submitter.submit(JobSpec("score", fields, labels, judge, pictures=pngs), asked)


def _check(lists: list[list[str]], vocabulary: Vocabulary, field: str) -> list[list[str]]:
    try:
        return vocabulary.check(lists, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, field) from error


async def _read_json(request: Request) -> tuple[ScoreFields, list[list[str]]]:
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise NotJson(f"the body is not JSON: {error}") from error
    try:
        body = ScoreRequest.model_validate(content)
    except ValidationError as error:
        raise BadRequest.from_validation(error) from error
    return body, body.conditions


async def _read_form(request: Request) -> Form:
    given, files = await read_form(request, {FILE: LIMITS.max_file_bytes, PICTURES: None})
    if FILE not in files:
        raise BadRequest.at(("body", FILE), "Field required")
    try:
        fields = ScoreFields.model_validate(given)
        return Form(
            fields, parse_any_lists(files[FILE], max_lists=LIMITS.max_pictures_per_request), files.get(PICTURES)
        )
    except ValidationError as error:
        raise BadRequest.from_validation(error) from error
    except LabelError as error:
        raise BadRequest.from_label_error(error, FILE) from error
