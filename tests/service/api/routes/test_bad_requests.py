"""What POST /generate and POST /score refuse: the answer names the fault, and nothing is queued. And addresses that do
not exist.
"""

import json
import sys
from typing import Any

import httpx
import pytest

from service.contract.errors import MAX_LISTED
from service.contract.recipe import example
from service.store.jobs import JobStore
from shared.options import LIMITS
from tests.service.api.answers import JSON, LISTS, Body, nothing_is_queued, problem, scoring

# Python 3.14 reads on, for more levels than a body may have.
NESTED = "nested too deeply" if sys.version_info < (3, 14) else "Expecting value at character 5000"


@pytest.mark.parametrize("field", ["labels", "file"])
@pytest.mark.parametrize(
    ("lists", "words", "entry"),
    [
        ([["red cube"], ["red kube"]], 'unknown label "red kube"; did you mean "red cube"?', 1),
        ([["red cube"]] * (LIMITS.max_pictures_per_request + 1), f"at most {LIMITS.max_pictures_per_request}", None),
    ],
)
def test_label_lists_that_are_not_valid(
    client: httpx.Client, alive: JobStore, field: str, lists: Any, words: str, entry: int | None
) -> None:
    sent = client.post("/score", **scoring(lists)) if field == "file" else client.post("/generate", json={field: lists})
    body = problem(sent, 422, "invalid-request")
    assert words in body["detail"]
    assert body["entry"] == entry
    assert body["errors"][0]["loc"] == ["body", field, *([] if entry is None else [entry])]
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": LIMITS.max_steps + 1},
        {"steps": "20"},
        {"guidance_interval": [0.5, 0.1]},
        {"sampler": "dpmpp"},
        {"eta": 0.5},  # the default sampler has none
        {"eta": 2, "sampler": "ddim"},
        {"seed": 2**53},
        {"columns": LIMITS.max_columns + 1},
        {"model": "../secret"},
        {"step": 20},
    ],
    ids=str,
)
def test_options_that_are_not_allowed(client: httpx.Client, alive: JobStore, fields: Body) -> None:
    body = problem(client.post("/generate", json={"labels": LISTS, **fields}), 422, "invalid-request")
    assert next(iter(fields)) in body["detail"]
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"seed":', "Expecting value at character 8"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number with too many digits"),
        (b'{"model": "\xff"}', "not utf-8 text at byte 11"),
        (b"[" * 5_000, NESTED),
    ],
)
def test_what_is_not_json_is_said_without_words_of_python(
    client: httpx.Client, alive: JobStore, content: bytes, why: str
) -> None:
    answer = problem(client.post("/generate", content=content, headers=JSON), 400, "not-json")
    assert answer["detail"] == f"the body is not JSON: {why}"
    assert nothing_is_queued(alive.connection)


VERDICT = {"accuracy": 1, "exact": True, "f1": 1, "scores": {f"label {i}": "" for i in range(1000)}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"labels": [[1] * 1000]}),
        ("/generate", {"labels": [[1]] * 1000}),
        ("/generate", {"labels": LISTS, "layouts": [[{}] * 1000]}),
        ("/generate", {"labels": LISTS, "layouts": [[{f"f{i}": 1 for i in range(1000)}]]}),
        ("/v1/images/generations", {"prompt": "red cube", **{f"f{i}": 1 for i in range(1000)}}),
        ("/generate", {"recipe": example() | {"verdicts": [VERDICT]}}),
    ],
)
def test_a_request_with_very_many_faults_lists_only_some(
    client: httpx.Client, alive: JobStore, path: str, body: Body
) -> None:
    found = client.post(path, json=body).json()
    assert len(found["errors"]) + found.get("errors_left_out", 0) < 30
    assert len(found["errors"]) <= MAX_LISTED
    assert nothing_is_queued(alive.connection)


def test_numbers_that_json_does_not_have(client: httpx.Client, alive: JobStore) -> None:
    for number in ("NaN", "1e999"):
        content = json.dumps({"labels": LISTS})[:-1] + f', "guidance": {number}}}'
        problem(client.post("/generate", content=content, headers=JSON), 422, "invalid-request")
    assert nothing_is_queued(alive.connection)


def test_a_whole_number_may_have_a_decimal_point_and_nothing_else_is_converted(
    client: httpx.Client, alive: JobStore
) -> None:
    body = {"labels": LISTS, "columns": 2.0, "guidance": 2, "seed": 7.0}
    job = client.post("/generate", json={**body, "steps": 16.0}, headers={"prefer": "respond-async"}).json()
    assert (job["options"]["steps"], job["options"]["guidance"], job["seed"]) == (16, 2.0, 7)
    for name, value in (("steps", 16.5), ("steps", True), ("steps", "16"), ("clip_x0", 1.0), ("seed", 1e300)):
        assert name in problem(client.post("/generate", json={**body, name: value}), 422, "invalid-request")["detail"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"recipe": example(), "trajectry": 2}, "trajectry: unknown; did you mean trajectory?"),
        ({"label": LISTS}, "label: unknown; did you mean labels?"),
    ],
)
def test_an_unknown_field_beside_a_recipe_or_in_place_of_one_is_refused_with_the_nearest_one(
    client: httpx.Client, body: Body, detail: str
) -> None:
    assert problem(client.post("/generate", json=body), 422, "invalid-request")["detail"] == detail


def test_an_unknown_model_is_reported_where_the_request_names_it(client: httpx.Client) -> None:
    asked = (
        client.get("/labels", params={"model": "zz"}),
        client.post("/generate", json={"labels": LISTS, "model": "zz"}),
    )
    places = [problem(answer, 422, "invalid-request")["errors"][0]["loc"] for answer in asked]
    assert places == [["query", "model"], ["body", "model"]]


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/jobs/nobody", 404, "unknown-job"),
        ("GET", "/jobs/nobody/images/one.png", 404, "unknown-job"),
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/jobs/", 404, "not-found"),
        ("GET", "/v1/models/", 404, "not-found"),
        ("GET", "/static", 404, "not-found"),
        ("PUT", "/generate", 405, "method-not-allowed"),
        ("GET", "/labels?model=nobody", 422, "invalid-request"),
    ],
)
def test_addresses_that_do_not_exist(client: httpx.Client, method: str, path: str, status: int, slug: str) -> None:
    problem(client.request(method, path), status, slug)
