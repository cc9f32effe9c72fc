"""Multipart forms: their fields as the values that they read as, their files as bytes of limited size."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from service.contract.errors import BadRequest, TooLarge

MAX_FIELDS = 20
LIST_FIELDS = ("guidance_interval", "webhook_events")  # a JSON list, or as forms have it the field again and again
TEXT_FIELDS = ("model", "sampler", "spacing", "webhook")  # names, also where they look like numbers


async def read_form(request: Request, limits: Mapping[str, int | None]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The form's fields and its files. `limits`: each file that it may have, with the most bytes that it may have; None
    leaves that to the limit on the body.

    A field that reads as a JSON number, true, false or list is taken as such; null is a text, for who means it leaves
    the field out. BadRequest for a file or field that is given twice and for a file that is not foreseen; 413 for one
    that is too large.
    """
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=len(limits), max_fields=MAX_FIELDS) as form:
        for name, value in form.multi_items():
            if name in LIST_FIELDS and isinstance(value, str):
                given = _value(name, value)
                fields[name] = [*fields.get(name, []), *(given if isinstance(given, list) else [given])]
            elif name in fields or name in files:
                raise BadRequest.at(("body", name), "given twice")
            elif name in limits:
                files[name] = await _content(name, value, limits[name])
            elif isinstance(value, str):
                fields[name] = _value(name, value)
            else:
                raise BadRequest.at(("body", name), f"a file; those known are {', '.join(limits)}")
    return fields, files


async def _content(name: str, value: UploadFile | str, limit: int | None) -> bytes:
    content = await value.read() if isinstance(value, UploadFile) else value.encode()
    if limit is not None and len(content) > limit:
        raise TooLarge(f"the file `{name}` has more than {limit} bytes")
    return content


def _value(name: str, value: str) -> Any:
    if name in TEXT_FIELDS:
        return value
    try:
        content = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return value if content is None else content
