"""OpenAI's form of an error, for problems under /v1. Knows no route."""

from functools import partial
from typing import Any

from service.api import openapi
from service.openai.schemas import OpenAIProblem

INVALID, OPENAIS_INVALID = 422, 400  # the statuses of an invalid request: the service's and OpenAI's


def with_openai_error(problem: dict[str, Any]) -> dict[str, Any]:
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


problems = partial(openapi.problems, written=with_openai_error, model=OpenAIProblem)
