"""The complete OpenAPI document: what FastAPI reads off the routes, and what all routes have in common.

A route names its own errors with `openapi_parts.problems`. This module adds those of guard, parameters and faults, and
gives errors under /v1 the form of the OpenAI API. Knows no route.
"""

from typing import Any

from fastapi import FastAPI

from service.api.openai.errors import INVALID, PREFIX, show_openai_errors
from service.api.openai.schemas import OpenAIProblem
from service.api.openapi_parts import SCHEMAS, examples_of, header, problems
from service.api.problems import SAFE_METHODS
from service.contract.errors import (
    BadRequest,
    CrossSite,
    NoKey,
    NotLocal,
    Problem,
    ServiceError,
    TooManyRequests,
)
from service.contract.events import PictureEvent, StatusEvent, StepsEvent
from service.contract.schemas import GenerateRequest, Job, JobPage
from service.telemetry.logs import REQUEST_ID

GUARD = (NoKey, NotLocal, TooManyRequests)  # answered before the request reaches a route
# Models that FastAPI does not find as a route's parameter or result.
ADDED_MODELS = (GenerateRequest, Problem, OpenAIProblem, StatusEvent, PictureEvent, StepsEvent)

REQUEST_ID_HEADER = header(
    "finds the request in the logs; the client's own X-Request-ID if it sent one", "7f3c9a", always=True
)
REQUEST_ID_PARAMETER = {
    "name": REQUEST_ID,
    "in": "header",
    "description": "the client's own id for the logs: 1 to 128 letters, digits and `._:/+=-`; "
    "the service replaces any other value with an id of its own",
    "schema": {"type": "string"},
    "example": "7f3c9a",
}


class DocumentedAPI(FastAPI):
    """An application with the complete document."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _complete(super().openapi())  # FastAPI keeps it as self.openapi_schema
        return super().openapi()


def _complete(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            responses = operation["responses"]
            for status, response in problems(*_common_errors(path, method, operation)).items():
                examples_of(responses.setdefault(str(status), response)).update(examples_of(response))
            if path.startswith(PREFIX):
                show_openai_errors(responses, SCHEMAS + OpenAIProblem.__name__)
            for response in responses.values():
                response.setdefault("headers", {})[REQUEST_ID] = {"$ref": f"#/components/headers/{REQUEST_ID}"}
            operation.setdefault("parameters", []).append({"$ref": f"#/components/parameters/{REQUEST_ID}"})
    document["components"] |= {
        "headers": {REQUEST_ID: REQUEST_ID_HEADER},
        "parameters": {REQUEST_ID: REQUEST_ID_PARAMETER},
    }
    schemas = document["components"]["schemas"]
    for of_fastapi in ("HTTPValidationError", "ValidationError"):
        schemas.pop(of_fastapi, None)
    for shown in (Job, JobPage):  # FastAPI leaves nulls out of their examples
        schemas[shown.__name__]["examples"] = shown.model_json_schema()["examples"]
    for model in ADDED_MODELS:
        schema = model.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema


def _common_errors(path: str, method: str, operation: dict[str, Any]) -> list[type[ServiceError]]:
    """Return the errors that no route names. Removes FastAPI's own description of requests that are not valid."""
    errors: list[type[ServiceError]] = [ServiceError]
    if "application/json" in operation["responses"].get(str(INVALID), {}).get("content", {}):
        del operation["responses"][str(INVALID)]
        errors.append(BadRequest)
    if "security" in operation:
        errors += GUARD if method.upper() in SAFE_METHODS else (*GUARD, CrossSite)
    return errors
