"""The OpenAPI document: what FastAPI reads off the routes, and what they all have in common.

A route names the errors of its own with `problems`. Those of guard, shutdown, parameters and faults are added here, and
under /v1 all of them get the form of the OpenAI API. Knows no route.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from service.api.openai.document import show_openai_errors
from service.api.openai.errors import INVALID, PREFIX
from service.api.openai.schemas import OpenAIProblem
from service.api.problems import PHRASES, PROBLEM_JSON, SAFE_METHODS
from service.api.server import STILL_ANSWERED
from service.contract.errors import (
    BadRequest,
    CrossSite,
    NoKey,
    NotLocal,
    Problem,
    ServiceError,
    ShuttingDown,
    TooManyRequests,
)
from service.contract.events import PictureEvent, StatusEvent, StepsEvent
from service.contract.schemas import Job, JobPage
from service.telemetry.logs import REQUEST_ID

Responses = dict[int | str, dict[str, Any]]

GUARD = (NoKey, NotLocal, TooManyRequests)  # what is answered before a route is asked
# Models that are no route's parameter or result.
NOT_SEEN = (Problem, OpenAIProblem, StatusEvent, PictureEvent, StepsEvent)
SCHEMAS, HEADERS, PARAMETERS = "#/components/schemas/", "#/components/headers/", "#/components/parameters/"


def header(description: str, example: str | int, *, always: bool = False) -> dict[str, Any]:
    """A response's header for the document; `always` for one that no such response lacks."""
    kind = "integer" if isinstance(example, int) else "string"
    return {"description": description, "schema": {"type": kind}, "example": example, "required": always}


RETRY_AFTER = header("seconds after which to come again", 6)
COMMON_HEADERS = {
    REQUEST_ID: header("finds the request in the logs; its own X-Request-ID where it has one", "7f3c9a", always=True)
}
COMMON_PARAMETERS = {
    REQUEST_ID: {
        "name": REQUEST_ID,
        "in": "header",
        "description": "an id of the client's own for the logs: 1 to 128 letters, digits and `._:/+=-`; "
        "in place of anything else the service makes one",
        "schema": {"type": "string"},
        "example": "7f3c9a",
    }
}
ERROR_HEADERS = {
    401: {"WWW-Authenticate": header("the scheme that is wanted", 'Bearer realm="labelgrid"', always=True)},
    429: {"Retry-After": {**RETRY_AFTER, "required": True}},
    503: {"Retry-After": RETRY_AFTER},
}


def problems(*errors: type[ServiceError]) -> Responses:
    """The responses of a route that answers with these errors: by status, with an example of each."""
    responses: Responses = {}
    for error in errors:
        description = PHRASES.get(error.status) or HTTPStatus(error.status).phrase
        content = {PROBLEM_JSON: {"schema": {"$ref": SCHEMAS + "Problem"}, "examples": {}}}
        new = {"description": description, "content": content, "headers": {**ERROR_HEADERS.get(error.status, {})}}
        examples = responses.setdefault(error.status, new)["content"][PROBLEM_JSON]["examples"]
        examples[error.slug] = {"summary": error.title, "value": error.body(error.example)}
    return responses


def form(files: dict[str, tuple[str, str]], fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A multipart form: `files`, name -> media type and description, of which the first is required, and the fields of
    a JSON schema. A field that is null in JSON is left out of a form.
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


def event_stream(events: dict[str, type[BaseModel]], *examples: dict[str, str]) -> dict[str, Any]:
    """Server-sent events by name, their data as JSON of a model. OpenAPI 3.1 describes one event of a stream."""
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
    """A link to another operation, with runtime expressions for its parameters."""
    return {"operationId": operation, "description": description, "parameters": parameters}


def job_links(job_id: str) -> dict[str, Any]:
    """From an answer to all that there is of its job; `job_id` is an expression such as `$response.body#/id`."""
    return {
        "job": link("read_job", "the job as it stands", job_id=job_id),
        "events": link("read_events", "what happens to it, as it happens", job_id=job_id),
        "grid": link("read_grid", "all pictures in one, once it is finished", job_id=job_id),
        "picture": link("read_image", "its first picture, once that is made", job_id=job_id, index="0"),
        "trajectory": link(
            "read_trajectory", "its first picture's way from noise, where that was asked for", job_id=job_id, index="0"
        ),
        "cancel": link("cancel_job", "ends it", job_id=job_id),
    }


def describe(app: FastAPI) -> None:
    """Makes `app.openapi()` the complete document."""
    of_routes = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(of_routes())  # which is kept as app.openapi_schema
        return of_routes()

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            guard = GUARD if method.upper() in SAFE_METHODS else (*GUARD, CrossSite)
            guarded = "security" in operation
            _add_errors(operation["responses"], guard if guarded else (), stops=path not in STILL_ANSWERED)
            if path.startswith(PREFIX):
                show_openai_errors(operation["responses"], SCHEMAS + OpenAIProblem.__name__)
            for response in operation["responses"].values():
                response.setdefault("headers", {}).update({name: {"$ref": HEADERS + name} for name in COMMON_HEADERS})
            operation.setdefault("parameters", []).extend({"$ref": PARAMETERS + name} for name in COMMON_PARAMETERS)
    document["components"] |= {"headers": COMMON_HEADERS, "parameters": COMMON_PARAMETERS}
    schemas = document["components"]["schemas"]
    for of_fastapi in ("HTTPValidationError", "ValidationError"):
        schemas.pop(of_fastapi, None)
    for shown in (Job, JobPage):  # of whose examples FastAPI leaves out what is null
        schemas[shown.__name__]["examples"] = shown.model_json_schema()["examples"]
    for model in NOT_SEEN:
        schema = model.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema


def _examples(response: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = response["content"][PROBLEM_JSON]["examples"]
    return found


def _add_errors(responses: dict[str, Any], guard: Sequence[type[ServiceError]], stops: bool) -> None:
    """Adds the errors that no route names."""
    checked = "application/json" in responses.get(str(INVALID), {}).get("content", {})
    if checked:  # FastAPI's own description of what we answer with a problem
        del responses[str(INVALID)]
    stopping = [ShuttingDown] if stops else []
    more = problems(ServiceError, *([BadRequest] if checked else []), *guard, *stopping)
    for status, response in more.items():
        _examples(responses.setdefault(str(status), response)).update(_examples(response))
