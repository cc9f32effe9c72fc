"""Request bodies that are JSON or a multipart form: how to read them, and their part of the OpenAPI document."""

import contextlib
import io
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile

from service.contract.errors import BadRequest, NotJson, UnsupportedBody

MAX_FIELDS, MAX_CHARACTERS = 20, 10_000  # of a form, and of each field
LIST_FIELDS = ("guidance_interval", "webhook_events")  # a JSON list, or the field several times as HTML forms do it
TEXT_FIELDS = ("model", "sampler", "spacing", "webhook")  # names, even if they look like numbers

Model = TypeVar("Model", bound=BaseModel)


@contextlib.asynccontextmanager
async def opened_body(request: Request, *files: str) -> AsyncIterator[tuple[Any, dict[str, UploadFile]]]:
    """Give the value of a JSON body, or a form's fields and files, which are on disk. A JSON body has no files.

    files: the names that a form's files may have, of which the first is required.

    Raises UnsupportedBody, NotJson, and BadRequest for a form with an unknown file, with a file or field that is given
    twice, or without its required file.
    """
    given = request.headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        async with request.form(max_files=len(files), max_fields=MAX_FIELDS) as form:
            yield _form_content(form, files)
        return
    if media_type != "application/json":
        raise UnsupportedBody(f"{given or 'none'}; wanted application/json or multipart/form-data")
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise NotJson.of(error) from error
    yield content, {}


def validate(model: type[Model], content: Any) -> Model:
    """Return the body as a `model`. Raises BadRequest."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise BadRequest.from_validation(error) from error


def describe_body(json_content: dict[str, Any], form_content: dict[str, Any]) -> dict[str, Any]:
    """Describe a body of either type, as a route's `openapi_extra`."""
    content = {"application/json": json_content, "multipart/form-data": form_content}
    return {"requestBody": {"required": True, "content": content}}


def describe_form(files: Mapping[str, tuple[str, str]], fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Describe a multipart form: its `files`, name -> (media type, description), of which the first is required, and
    the fields of a JSON schema. A form leaves out what is null in JSON.
    """
    encoding = {name: {"contentType": media_type} for name, (media_type, _) in files.items()}
    properties: dict[str, Any] = {
        name: {"type": "string", "format": "binary", "description": description}
        for name, (_, description) in files.items()
    }
    for name, field in fields.items():
        value, *_null = field.get("anyOf", [{}])
        properties[name] = {**{key: field[key] for key in field if key not in ("anyOf", "title")}, **value}
    schema = {
        "type": "object",
        "properties": properties,
        "required": [next(iter(files))],
        "additionalProperties": False,
    }
    return {"schema": {**schema, **more}, "encoding": encoding}


def _form_content(form: FormData, known: Sequence[str]) -> tuple[dict[str, Any], dict[str, UploadFile]]:
    """Return the fields and files.

    A field that is a JSON number, boolean or list becomes that value; `null` stays text, because a form leaves out what
    is null.
    """
    fields: dict[str, Any] = {}
    files: dict[str, UploadFile] = {}
    for name, value in form.multi_items():
        if isinstance(value, str) and name not in known and len(value) > MAX_CHARACTERS:
            raise BadRequest.at(("body", name), f"more than {MAX_CHARACTERS} characters")
        if name in LIST_FIELDS and isinstance(value, str):
            given = _value(name, value)
            fields[name] = [*fields.get(name, []), *(given if isinstance(given, list) else [given])]
        elif name in fields or name in files:
            raise BadRequest.at(("body", name), "given twice")
        elif name in known:
            files[name] = _as_file(value) if isinstance(value, str) else value
        elif isinstance(value, str):
            fields[name] = _value(name, value)
        else:
            raise BadRequest.at(("body", name), f"unknown file; known are {', '.join(known)}")
    if known[0] not in files:
        raise BadRequest.at(("body", known[0]), "Field required")
    return fields, files


def _as_file(value: str) -> UploadFile:
    content = value.encode()
    return UploadFile(io.BytesIO(content), size=len(content))


def _value(name: str, value: str) -> Any:
    if name in TEXT_FIELDS:
        return value
    try:
        content = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return value if content is None else content
