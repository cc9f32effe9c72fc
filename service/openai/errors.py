"""OpenAI's form of an error, for problems under /v1. Knows no route."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from service.contract.errors import PROBLEM_JSON
from service.openai.schemas import OpenAIProblem

INVALID, OPENAIS_INVALID = 422, 400  # the statuses of an invalid request: the service's and OpenAI's


def with_openai_error(problem: Mapping[str, Any]) -> dict[str, Any]:
    """Add OpenAI's `error` member to a problem, with OpenAI's status for an invalid request."""
    status = OPENAIS_INVALID if problem["status"] == INVALID else problem["status"]
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    loc: list[str | int] = next((error["loc"] for error in problem.get("errors", [])), [])
    error = {
        "message": problem["detail"],
        "type": kind,
        "param": str(loc[1]) if len(loc) > 1 else None,
        "code": problem["type"].rpartition(":")[2].replace("-", "_"),
    }
    return {**problem, "status": status, "error": error}


def document(responses: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Give the documented errors of an operation the form that `with_openai_error` gives problems."""
    schema = OpenAIProblem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= {**schema.pop("$defs"), OpenAIProblem.__name__: schema}
    for response in responses.values():
        if problem := response.get("content", {}).get(PROBLEM_JSON):
            problem["schema"] = {"$ref": f"#/components/schemas/{OpenAIProblem.__name__}"}
            for example in problem["examples"].values():
                example["value"] = with_openai_error(example["value"])
    if invalid := responses.pop(str(INVALID), None):
        invalid["description"] = HTTPStatus(OPENAIS_INVALID).phrase
        documented = responses.setdefault(str(OPENAIS_INVALID), invalid)["content"][PROBLEM_JSON]
        documented["examples"].update(invalid["content"][PROBLEM_JSON]["examples"])
