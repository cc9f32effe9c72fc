"""How the OpenAPI document shows errors under /v1."""

from http import HTTPStatus
from typing import Any

from service.api.openai.errors import INVALID, OPENAIS_INVALID, with_openai_error
from service.api.problems import PROBLEM_JSON


def show_openai_errors(responses: dict[str, Any], problem_schema: str) -> None:
    """Give the documented errors of an operation the form in which `problems.py` sends them."""
    for response in responses.values():
        if problem := response.get("content", {}).get(PROBLEM_JSON):
            problem["schema"] = {"$ref": problem_schema}
            for example in problem["examples"].values():
                example["value"] = with_openai_error(example["value"])
    if invalid := responses.pop(str(INVALID), None):
        invalid["description"] = HTTPStatus(OPENAIS_INVALID).phrase
        documented = responses.setdefault(str(OPENAIS_INVALID), invalid)["content"][PROBLEM_JSON]
        documented["examples"].update(invalid["content"][PROBLEM_JSON]["examples"])
