"""The OpenAPI document is valid and complete. `Documented` checks every answer in the tests against it."""

import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from service.api.problems import PHRASES
from service.contract.errors import BadForm, NotFound, TooLarge
from service.settings import Settings
from tests.conftest import application

DOCUMENT = application(Settings()).openapi()
OPERATIONS: dict[str, dict[str, Any]] = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}
PROBLEM_JSON = "application/problem+json"
BY_ID = {operation["operationId"]: operation for operation in OPERATIONS.values()}


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPERATIONS[request.param]


def test_the_document_is_valid() -> None:
    validate(DOCUMENT)
    assert len(BY_ID) == len(OPERATIONS)
    used = set(re.findall(r"#/components/schemas/(\w+)", repr(DOCUMENT)))
    assert used == DOCUMENT["components"]["schemas"].keys()


def examples_of(content: dict[str, Any]) -> list[Any]:
    """Return the examples of a media type: its own, or its schema's."""
    if "examples" in content:
        return [example["value"] for example in content["examples"].values()]
    if "example" in content:
        return [content["example"]]
    schema = content["schema"]
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    found: list[Any] = schema.get("examples", [])
    return found


def has_good_examples(content: dict[str, Any]) -> bool:
    examples = examples_of(content)
    for example in examples:
        Draft202012Validator({**content["schema"], "components": DOCUMENT["components"]}).validate(example)
    return bool(examples)


def test_operations_say_what_they_do_with_examples(operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    for parameter in operation.get("parameters", []):
        assert parameter["description"], parameter["name"]
        assert has_good_examples(parameter), parameter["name"]
    for media_type, content in operation.get("requestBody", {"content": {}})["content"].items():
        assert has_good_examples(content), media_type
    for status, response in operation["responses"].items():
        assert response["description"]
        assert ("content" in response) == (status != "204")
        for content in response.get("content", {}).values():
            has_good_examples(content)


def test_a_problem_has_one_title_whether_a_route_or_the_framework_finds_it() -> None:
    """RFC 9457, 3.1.3: the title of a type does not change from one occurrence to the next."""
    for error in (BadForm, NotFound, TooLarge):
        phrase = PHRASES.get(error.status) or HTTPStatus(error.status).phrase
        assert (error.slug, error.title) == (phrase.lower().replace(" ", "-"), phrase)


def problems_of(operation: dict[str, Any]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for status, response in operation["responses"].items():
        if int(status) >= 400:
            assert response["content"].keys() == {PROBLEM_JSON}
            for slug, example in response["content"][PROBLEM_JSON]["examples"].items():
                yield int(status), slug, example["value"]


def test_operations_name_their_errors(operation: dict[str, Any]) -> None:
    named = set()
    for status, slug, problem in problems_of(operation):
        assert (problem["type"], problem["status"]) == (f"urn:labelgrid:problem:{slug}", status)
        assert problem["title"]
        assert problem["detail"]
        named.add(f"{status} {slug}")
    wanted = {"500 internal-error"}
    if "security" in operation:
        assert operation["security"] == [{"ApiKey": []}]
        wanted |= {"401 no-key", "403 not-local", "429 too-many-requests"}
    openai = "error" in problem
    if operation.get("parameters", []) or "requestBody" in operation:
        wanted |= {"400 invalid-request" if openai else "422 invalid-request"}
    if "requestBody" in operation:
        wanted |= {"400 not-json", "413 content-too-large", "409 job-cancelled", "429 queue-full", "503 no-worker"}
    if any(parameter["name"] == "job_id" for parameter in operation.get("parameters", [])):
        wanted |= {"404 unknown-job", "410 expired-job", "503 unavailable"}
    assert wanted <= named
