"""The OpenAPI document: FastAPI reads it off the routes; `problems` describes their errors."""

from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from fastapi import FastAPI

from service.api.problems import PHRASES
from service.contract.errors import (
    PROBLEM_JSON,
    BadRequest,
    CrossSite,
    NoKey,
    NotLocal,
    Problem,
    ServiceError,
    TooManyRequests,
    problem_body,
)

Responses = dict[int | str, dict[str, Any]]


class Dialect(NamedTuple):
    """How the routes under a prefix write a problem, and its schema."""

    prefix: str
    written: Callable[[dict[str, Any]], dict[str, Any]]
    model: type[Problem]


OWN: Final = Dialect("/", dict, Problem)
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
PNG: dict[str, Any] = {"image/png": BINARY}
REF = "#/components/schemas/{model}"
API_KEY = {"type": "http", "scheme": "bearer", "description": "if the service has API keys"}
GUARDED = (BadRequest, NoKey, NotLocal, CrossSite, TooManyRequests)  # of each route that is not public


def public_problems(*errors: type[ServiceError], dialect: Dialect = OWN) -> Responses:
    """Describe the responses for these errors: grouped by status, with an example of each."""
    responses: Responses = {}
    every: tuple[type[ServiceError], ...] = (*errors, ServiceError)
    for error in every:
        problem = dialect.written(problem_body(error.status, error.slug, error.title, error.example))
        status = problem["status"]
        content = {PROBLEM_JSON: {"schema": {"$ref": REF.format(model=dialect.model.__name__)}, "examples": {}}}
        description = PHRASES.get(status) or HTTPStatus(status).phrase
        response = responses.setdefault(status, {"description": description, "content": content})
        examples = response["content"][PROBLEM_JSON]["examples"]
        examples[error.slug] = {"summary": error.title, "value": problem}
    return responses


def problems(*errors: type[ServiceError], dialect: Dialect = OWN) -> Responses:
    """Describe the responses of a route for these errors, and for those that every guarded route has."""
    return public_problems(*errors, *GUARDED, dialect=dialect)


class DocumentedAPI(FastAPI):
    """An application whose document has the schemas of problems in place of FastAPI's own errors.

    `public`: paths that need no API key.
    """

    def __init__(self, *, public: Collection[str], **options: Any) -> None:
        super().__init__(**options)
        self.public, self.dialects = public, [OWN]

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()  # FastAPI keeps it as self.openapi_schema
            schemas = document["components"]["schemas"]
            for dialect in self.dialects:
                schema = dialect.model.model_json_schema(ref_template=REF)
                schemas |= {**schema.pop("$defs", {}), dialect.model.__name__: schema}
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            document["components"]["securitySchemes"] = {"ApiKey": API_KEY}
            for path, item in document["paths"].items():
                for operation in item.values():
                    if path not in self.public:
                        operation["security"] = [{"ApiKey": []}]
                    # FastAPI's own 422, of a dialect that has another status for it
                    if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                        del operation["responses"]["422"]
        return super().openapi()
