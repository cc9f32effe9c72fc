"""Parts of the OpenAPI document that routes put together: their errors, headers, event streams and links.

Knows no route. `openapi.py` adds what all routes have in common.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from service.api.problems import PHRASES
from service.contract.errors import (
    PROBLEM_JSON,
    ExpiredJob,
    NotReady,
    ServiceError,
    Unavailable,
    UnknownJob,
    UnknownPicture,
    problem_body,
)

Responses = dict[int | str, dict[str, Any]]

SCHEMAS = "#/components/schemas/"
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
PNG: dict[str, Any] = {"image/png": BINARY}


def header(description: str, example: str | int, *, always: bool = False) -> dict[str, Any]:
    """Describe a response header; `always` if every such response has it."""
    kind = "integer" if isinstance(example, int) else "string"
    return {"description": description, "schema": {"type": kind}, "example": example, "required": always}


def request_header(name: str, description: str, *examples: str, **schema: Any) -> dict[str, Any]:
    """Describe an optional header of a request that a route reads itself, for its `parameters`."""
    schema = {"type": "string", **schema, "description": description, "examples": [*examples], "title": name}
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": description}


RETRY_AFTER = header("seconds to wait before the next attempt", 6)
ERROR_HEADERS = {
    401: {"WWW-Authenticate": header("the authentication scheme to use", 'Bearer realm="labelgrid"', always=True)},
    429: {"Retry-After": {**RETRY_AFTER, "required": True}},
    503: {"Retry-After": RETRY_AFTER},
}


def problems(*errors: type[ServiceError]) -> Responses:
    """Describe the responses for these errors: grouped by status, with an example of each."""
    responses: Responses = {}
    for error in errors:
        description = PHRASES.get(error.status) or HTTPStatus(error.status).phrase
        content = {PROBLEM_JSON: {"schema": {"$ref": SCHEMAS + "Problem"}, "examples": {}}}
        new = {"description": description, "content": content, "headers": {**ERROR_HEADERS.get(error.status, {})}}
        response = responses.setdefault(error.status, new)
        value = problem_body(error.status, error.slug, error.title, error.example)
        examples_of(response)[error.slug] = {"summary": error.title, "value": value}
    return responses


def examples_of(response: dict[str, Any]) -> dict[str, Any]:
    """Return the examples of a response that `problems` described, by slug."""
    examples: dict[str, Any] = response["content"][PROBLEM_JSON]["examples"]
    return examples


PICTURE_RESPONSES: Responses = {
    200: {"content": PNG, "description": "The picture"},
    **problems(UnknownJob, ExpiredJob, Unavailable, NotReady, UnknownPicture),
}

ZIP_RESPONSES: Responses = {
    200: {
        "content": {"application/zip": BINARY},
        "description": "The zip",
        "headers": {"Content-Disposition": header("a name for the file", 'attachment; filename="5f0c9e1a.zip"')},
    },
    **problems(UnknownJob, ExpiredJob, Unavailable, NotReady),
}


def event_stream(events: Mapping[str, type[BaseModel]], *examples: dict[str, str]) -> dict[str, Any]:
    """Describe server-sent events: name -> model of its JSON data. OpenAPI 3.1 describes one event of a stream."""
    items = [
        {
            "type": "object",
            "properties": {
                "event": {"const": name},
                "id": {"type": "string"},
                "data": {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {"$ref": SCHEMAS + model.__name__},
                },
            },
            "required": ["event", "data"],
        }
        for name, model in events.items()
    ]
    shown = {event["event"]: {"value": event} for event in examples}
    return {"text/event-stream": {"schema": {"oneOf": items}, "examples": shown}}


def link(operation: str, description: str, **parameters: str) -> dict[str, Any]:
    """Link to another operation, with runtime expressions for its parameters."""
    return {"operationId": operation, "description": description, "parameters": parameters}


def job_links(job_id: str) -> dict[str, Any]:
    """Link to every operation on a job; `job_id` is an expression such as `$response.body#/id`."""
    return {
        "job": link("read_job", "the job's current state", job_id=job_id),
        "events": link("read_events", "the job's progress as events", job_id=job_id),
        "grid": link("read_grid", "all pictures in one grid, once the job is finished", job_id=job_id),
        "pictures": link("read_zip", "all pictures in a zip, once the job is finished", job_id=job_id),
        "picture": link("read_image", "its first picture, once it is finished", job_id=job_id, index="0"),
        "trajectory": link(
            "read_trajectory", "the trajectory of its first picture, if requested", job_id=job_id, index="0"
        ),
        "cancel": link("cancel_job", "cancels the job", job_id=job_id),
        "retry": link("retry_job", "creates a new job like this one, if it failed", job_id=job_id),
    }
