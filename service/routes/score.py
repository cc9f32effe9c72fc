"""POST /score: a test file in, the scores of repeated runs over it out."""

import json
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from service.errors import BadRequest, NotJson, ServiceError
from service.forms import read_form
from service.models import vocabulary_of
from service.schemas import Job, ScoreFields, ScoreRequest
from service.submit import RESPONSES, SubmitterDep
from shared.options import LIMITS
from shared.vocabulary import LabelError, Vocabulary, parse_label_lists

router = APIRouter(tags=["pictures"])

FILE = "file"


class UnsupportedBody(ServiceError):
    status, slug, title = 415, "unsupported-media-type", "The body's type is not supported"


def _form_schema() -> dict[str, Any]:
    """OpenAPI's description of the form: the fields of the JSON body, with a file in place of `conditions`."""
    schema = ScoreFields.model_json_schema()
    schema["properties"] = {FILE: {"type": "string", "format": "binary"}, **schema["properties"]}
    return {**schema, "required": [FILE]}


OPENAPI = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _form_schema()},
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
    responses={**RESPONSES, 415: RESPONSES[422]},
    openapi_extra=OPENAPI,
    summary="Score the model on a test file",
)
async def score(request: Request, submitter: SubmitterDep) -> Response:
    """Makes every picture of a test file `repeats` times, run r with seed + r, and scores each run."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    lists: bytes | list[list[str]]
    if content_type == "multipart/form-data":
        fields, lists = await _read_form(request)
    elif content_type == "application/json":
        fields, lists = await _read_json(request)
    else:
        raise UnsupportedBody(f"{content_type or 'no type'}: wanted multipart/form-data or application/json")
    info = await submitter.model(fields.model)
    labels = _check(lists, vocabulary_of(info))
    return await submitter.submit("score", fields, labels, info, fields.repeats)


def _check(lists: bytes | list[list[str]], vocabulary: Vocabulary) -> list[list[str]]:
    try:
        if isinstance(lists, bytes):
            return parse_label_lists(lists, vocabulary, max_lists=LIMITS.max_pictures_per_request)
        return vocabulary.check(lists, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, FILE if isinstance(lists, bytes) else "conditions") from error


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


async def _read_form(request: Request) -> tuple[ScoreFields, bytes]:
    given, files = await read_form(request, {FILE: LIMITS.max_file_bytes})
    if FILE not in files:
        raise BadRequest.at(("body", FILE), "Field required")
    try:
        return ScoreFields.model_validate(given), files[FILE]
    except ValidationError as error:
        raise BadRequest.from_validation(error) from error
