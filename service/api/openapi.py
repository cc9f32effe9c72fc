"""The OpenAPI document: FastAPI reads it off the routes; this adds the errors, all of them RFC 9457 problems."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from service.api.problems import PHRASES, SAFE_METHODS, Dialect
from service.contract.errors import (
    PROBLEM_JSON,
    BadRequest,
    CrossSite,
    ExpiredJob,
    NoKey,
    NotLocal,
    NotReady,
    Problem,
    ServiceError,
    TooManyRequests,
    Unavailable,
    UnknownJob,
    UnknownPicture,
    problem_body,
)
from service.contract.schemas import Job, JobPage

Responses = dict[int | str, dict[str, Any]]

INVALID = "422"
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
PNG: dict[str, Any] = {"image/png": BINARY}


def problems(*errors: type[ServiceError]) -> Responses:
    """Describe the responses for these errors: grouped by status, with an example of each."""
    responses: Responses = {}
    for error in errors:
        description = PHRASES.get(error.status) or HTTPStatus(error.status).phrase
        content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}}
        response = responses.setdefault(error.status, {"description": description, "content": content})
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
    200: {"content": {"application/zip": BINARY}, "description": "The zip"},
    **problems(UnknownJob, ExpiredJob, Unavailable, NotReady),
}


class DocumentedAPI(FastAPI):
    """An application whose document also has the errors that no route names: of guard, parameters and faults."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state.dialects = dict[str, Dialect]()  # by prefix of their paths

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()  # FastAPI keeps it as self.openapi_schema
            schemas = document["components"]["schemas"]
            for of_fastapi in ("HTTPValidationError", "ValidationError"):
                schemas.pop(of_fastapi, None)
            schemas["Problem"] = Problem.model_json_schema()
            for shown in (Job, JobPage):  # FastAPI leaves nulls out of their examples
                schemas[shown.__name__]["examples"] = shown.model_json_schema()["examples"]
            for path, item in document["paths"].items():
                for method, operation in item.items():
                    _add_errors(method, operation)
                    for prefix, dialect in self.state.dialects.items():
                        if path.startswith(prefix):
                            dialect.document(operation["responses"], schemas)
        return super().openapi()


def _add_errors(method: str, operation: dict[str, Any]) -> None:
    errors: list[type[ServiceError]] = [ServiceError]
    responses = operation["responses"]
    if "application/json" in responses.get(INVALID, {}).get("content", {}):  # FastAPI's own description
        del responses[INVALID]
        errors.append(BadRequest)
    if "security" in operation:
        errors += [NoKey, NotLocal, TooManyRequests]
        errors += [] if method.upper() in SAFE_METHODS else [CrossSite]
    for status, response in problems(*errors).items():
        examples_of(responses.setdefault(str(status), response)).update(examples_of(response))
