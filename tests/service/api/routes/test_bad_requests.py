"""What POST /generate and POST /score refuse: the answer names the fault, and nothing is queued."""

import gc
import json
import sys
import weakref
from typing import Any

import httpx
import pytest

from service.api.uploads.png import PngError
from service.contract.errors import MAX_LISTED
from service.contract.recipe import example
from service.store.jobs import JobStore
from shared.options import LIMITS
from shared.vocabulary import ICLEVR
from tests.service.api.answers import JSON, LISTS, Body, nothing_is_queued, problem
from tests.service.processes import until

# Python 3.14 reads on, for more levels than a body may have.
NESTED = "nested too deeply" if sys.version_info < (3, 14) else "Expecting value at character 5000"
BAD_LISTS = [
    ([["red cube"], ["red kube"]], 'unknown label "red kube"; did you mean "red cube"?', 1),
    ([["cube red"]], 'did you mean "red cube"?', 0),
    ([["red cube"], []], "empty list", 1),
    ([["red cube", "gray cube", "red cube"]], 'duplicate label "red cube"', 0),
    ([list(ICLEVR.names[: LIMITS.max_labels + 1])], f"at most {LIMITS.max_labels} are allowed", 0),
    ([["red cube"]] * (LIMITS.max_pictures_per_request + 1), f"at most {LIMITS.max_pictures_per_request}", None),
    ([], "at least one", None),
]


@pytest.mark.parametrize(("path", "field"), [("/generate", "labels"), ("/score/conditions", "conditions")])
@pytest.mark.parametrize(("lists", "words", "entry"), BAD_LISTS)
def test_label_lists_that_are_not_valid(
    client: httpx.Client, alive: JobStore, path: str, field: str, lists: Any, words: str, entry: int | None
) -> None:
    body = problem(client.post(path, json={field: lists}), 422, "invalid-request")
    assert words in body["detail"]
    assert body["entry"] == entry
    assert body["errors"][0]["loc"] == ["body", field, *([] if entry is None else [entry])]
    assert nothing_is_queued(alive.connection)


BAD_VALUES: dict[str, list[Any]] = {
    "steps": [0, LIMITS.max_steps + 1, 2.5, "20", True],
    "guidance": [-0.5, 1e9, "2"],
    "guidance_interval": [[0.5, 0.1], [0.1], [0.1, 1.5]],
    "sampler": ["dpmpp"],
    "spacing": ["karras"],
    "eta": [0.5],  # the default sampler has none
    "clip_x0": [1],
    "seed": [-1, False, 2**53],
    "columns": [0, LIMITS.max_columns + 1],
    "model": ["nobody", "../secret", "toy-evaluator", 7],
    "step": [20],
}
BAD_FIELDS: list[tuple[Body, str]] = [({name: value}, name) for name, values in BAD_VALUES.items() for value in values]
BAD_FIELDS += [({"eta": 2, "sampler": "ddim"}, "eta")]


@pytest.mark.parametrize(
    ("path", "field", "fields", "named"),
    [("/generate", "labels", *one) for one in BAD_FIELDS]
    + [("/score/conditions", "conditions", *one) for one in BAD_FIELDS[::5]],
)  # both bodies inherit their options
def test_options_that_are_not_allowed(
    client: httpx.Client, alive: JobStore, path: str, field: str, fields: Body, named: str
) -> None:
    body = problem(client.post(path, json={field: LISTS, **fields}), 422, "invalid-request")
    assert named in body["detail"]
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize("path", ["/generate", "/score/conditions", "/v1/images/generations"])
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
    client: httpx.Client, alive: JobStore, path: str, content: bytes, why: str
) -> None:
    answer = problem(client.post(path, content=content, headers=JSON), 400, "not-json")
    assert answer["detail"] == f"the body is not JSON: {why}"
    assert nothing_is_queued(alive.connection)


VERDICT = {"accuracy": 1, "exact": True, "f1": 1, "scores": {f"label {i}": "" for i in range(1000)}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"labels": [[1] * 1000]}),
        ("/generate", {"labels": [[1]] * 1000}),
        ("/score/conditions", {"conditions": [[1] * 1000]}),
        ("/generate", {"labels": LISTS, "layouts": [[{}] * 1000]}),
        ("/generate", {"labels": LISTS, "layouts": [1] * 1000}),
        ("/generate", {"labels": LISTS, "layouts": [[{f"f{i}": 1 for i in range(1000)}]]}),
        ("/generate", {"labels": LISTS, **{f"f{i}": 1 for i in range(1000)}}),
        ("/v1/images/generations", {"prompt": "red cube", **{f"f{i}": 1 for i in range(1000)}}),
        ("/generate", {"recipe": example() | {"verdicts": [{}] * 1000}}),
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
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
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
        ({"recip": example()}, "recip: unknown; did you mean recipe?"),
        ({"label": LISTS}, "label: unknown; did you mean labels?"),
    ],
)
def test_an_unknown_field_beside_a_recipe_or_in_place_of_one_is_refused_with_the_nearest_one(
    client: httpx.Client, body: Body, detail: str
) -> None:
    assert problem(client.post("/generate", json=body), 422, "invalid-request")["detail"] == detail


def test_an_unknown_model_is_reported_where_the_request_names_it(client: httpx.Client) -> None:
    found = problem(client.get("/labels", params={"model": "zz"}), 422, "invalid-request")
    assert found["errors"][0]["loc"] == ["query", "model"]
    found = problem(client.post("/generate", json={"labels": LISTS, "model": "zz"}), 422, "invalid-request")
    assert found["errors"][0]["loc"] == ["body", "model"]


def test_what_a_refused_request_held_is_free_at_once(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload has 32 MiB, and the API's garbage collector comes late."""
    held = list[weakref.ref[PngError]]()

    def refuse(content: bytes) -> None:
        upload = PngError("in place of what is large")
        held.append(weakref.ref(upload))
        raise PngError("no PNG")

    monkeypatch.setattr("service.api.routes.generate.recipe_of", refuse)
    gc.disable()
    try:
        assert client.post("/generate/png", files={"file": b"x"}).status_code == 422
        until(lambda: held[0]() is None)
    finally:
        gc.enable()
