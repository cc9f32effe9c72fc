"""The endpoints: every bad input is a problem that leaves nothing behind, and every good one the answer asked for."""

import asyncio
import io
import json
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from redis import Redis

from service.api.preferences import Preferences, read_preferences
from service.contract.errors import MAX_LISTED, BadRequest
from service.contract.recipe import example
from service.settings import Settings
from service.store import workers
from service.store.connection import text
from service.store.jobs import JobStore
from service.store.keys import WORKERS, job_key, png_key, tombstone_key, verdicts_key, worker_key
from service.worker.runner import Runner
from shared.checkpoint import publish
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.options import LIMITS, SamplingOptions, picture_seed
from shared.registry import promote, resolve
from shared.vocabulary import ICLEVR
from tests.conftest import serving
from trainer.score import best, score_run, summary

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
JSON = {"content-type": "application/json"}
Body = dict[str, Any]


def problem(response: httpx.Response, status: int, slug: str) -> Body:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: Body = response.json()
    assert body["type"] == f"urn:labelgrid:problem:{slug}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body


def nothing_is_queued(connection: Redis) -> bool:
    return {text(key) for key in connection.keys("*")} <= {WORKERS, worker_key("w")}


BAD_LISTS = [
    ([["red cube"], ["red kube"]], 'unknown label "red kube"; did you mean "red cube"?', 1),
    ([["cube red"]], 'did you mean "red cube"?', 0),
    ([["red cube"], []], "empty list", 1),
    ([["red cube", "gray cube", "red cube"]], 'duplicate label "red cube"', 0),
    ([list(ICLEVR.names[: LIMITS.max_labels + 1])], f"at most {LIMITS.max_labels} are allowed", 0),
    ([["red cube"]] * (LIMITS.max_pictures_per_request + 1), f"at most {LIMITS.max_pictures_per_request}", None),
    ([], "at least one", None),
]


@pytest.mark.parametrize(("path", "field"), [("/generate", "labels"), ("/score", "conditions")])
@pytest.mark.parametrize(("lists", "words", "entry"), BAD_LISTS)
def test_label_lists_that_cannot_be_drawn(
    client: httpx.Client, alive: JobStore, path: str, field: str, lists: Any, words: str, entry: int | None
) -> None:
    body = problem(client.post(path, json={field: lists}), 422, "invalid-request")
    assert words in body["detail"]
    assert body["entry"] == entry
    assert body["errors"][0]["loc"] == ["body", field, *([] if entry is None else [entry])]
    assert nothing_is_queued(alive.connection)


BAD_FIELDS: list[tuple[Body, str]] = [
    ({"steps": 0}, "steps"),
    ({"steps": LIMITS.max_steps + 1}, "steps"),
    ({"steps": 2.5}, "steps"),
    ({"steps": "20"}, "steps"),
    ({"steps": True}, "steps"),
    ({"guidance": -0.5}, "guidance"),
    ({"guidance": 1e9}, "guidance"),
    ({"guidance": "2"}, "guidance"),
    ({"guidance_interval": [0.5, 0.1]}, "guidance_interval"),
    ({"guidance_interval": [0.1]}, "guidance_interval"),
    ({"guidance_interval": [0.1, 1.5]}, "guidance_interval"),
    ({"sampler": "dpmpp"}, "sampler"),
    ({"sampler": "euler", "eta": 0.5}, "eta"),
    ({"spacing": "karras"}, "spacing"),
    ({"eta": 2, "sampler": "ddim"}, "eta"),
    ({"clip_x0": 1}, "clip_x0"),
    ({"seed": -1}, "seed"),
    ({"seed": False}, "seed"),
    ({"seed": 2**53}, "seed"),
    ({"columns": 0}, "columns"),
    ({"columns": LIMITS.max_columns + 1}, "columns"),
    ({"model": "nobody"}, "model"),
    ({"model": "../secret"}, "model"),
    ({"model": "toy-evaluator"}, "model"),
    ({"model": 7}, "model"),
    ({"step": 20}, "step"),
]


@pytest.mark.parametrize(("path", "field"), [("/generate", "labels"), ("/score", "conditions")])
@pytest.mark.parametrize(("fields", "named"), BAD_FIELDS)
def test_options_that_are_not_allowed(
    client: httpx.Client, alive: JobStore, path: str, field: str, fields: Body, named: str
) -> None:
    body = problem(client.post(path, json={field: LISTS, **fields}), 422, "invalid-request")
    assert named in body["detail"]
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize("path", ["/generate", "/score"])
@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"labels": NaN', b"null", b"[]", b'"x"', b"7"]
)
def test_bodies_of_the_wrong_shape(client: httpx.Client, alive: JobStore, path: str, content: bytes) -> None:
    response = client.post(path, content=content, headers=JSON)
    assert response.status_code in (400, 422), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"labels": None},
        {"labels": "red cube"},
        {"labels": ["red cube"]},
        {"labels": {"0": ["red cube"]}},
        {"labels": [[7]]},
        {"labels": [[None]]},
        {"labels": [[["red cube"]]]},
        {"conditions": LISTS},
    ],
)
def test_labels_of_the_wrong_shape(client: httpx.Client, alive: JobStore, body: Body) -> None:
    assert "labels" in problem(client.post("/generate", json=body), 422, "invalid-request")["detail"]
    assert nothing_is_queued(alive.connection)


VERDICT = {"accuracy": 1, "exact": True, "f1": 1, "scores": {f"label {i}": "" for i in range(1000)}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"labels": [[1] * 1000]}),
        ("/generate", {"labels": [[1]] * 1000}),
        ("/score", {"conditions": [[1] * 1000]}),
        ("/generate", {"labels": LISTS, "layouts": [[{}] * 1000]}),
        ("/generate", {"labels": LISTS, "layouts": [1] * 1000}),
        ("/generate", {"labels": LISTS, "layouts": [[{f"f{i}": 1 for i in range(1000)}]]}),
        ("/generate", {"labels": LISTS, **{f"f{i}": 1 for i in range(1000)}}),
        ("/v1/images/generations", {"prompt": "red cube", **{f"f{i}": 1 for i in range(1000)}}),
        ("/generate", {"recipe": example() | {"verdicts": [{}] * 1000}}),
        ("/generate", {"recipe": example() | {"verdicts": [VERDICT]}}),
    ],
)
def test_of_very_many_faults_few_are_looked_for(client: httpx.Client, alive: JobStore, path: str, body: Body) -> None:
    found = client.post(path, json=body).json()
    assert len(found["errors"]) + found.get("errors_left_out", 0) < 30
    assert len(found["errors"]) <= MAX_LISTED
    assert nothing_is_queued(alive.connection)


def test_faults_beyond_those_listed_are_counted() -> None:
    errors = [{"loc": ("body", i), "msg": "no", "type": "x"} for i in range(MAX_LISTED + 5)]
    assert "errors_left_out" not in BadRequest.from_errors(errors[:MAX_LISTED]).members
    members = BadRequest.from_errors(errors).members
    assert (len(members["errors"]), members["errors_left_out"]) == (MAX_LISTED, 5)


def test_numbers_that_json_does_not_have(client: httpx.Client, alive: JobStore) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        content = json.dumps({"labels": LISTS})[:-1] + f', "guidance": {number}}}'
        problem(client.post("/generate", content=content, headers=JSON), 422, "invalid-request")
    assert nothing_is_queued(alive.connection)


def test_a_json_body_that_does_not_say_so(client: httpx.Client, alive: JobStore) -> None:
    problem(client.post("/generate", content=json.dumps({"labels": LISTS})), 422, "invalid-request")
    problem(client.post("/score", content=json.dumps({"conditions": LISTS})), 415, "unsupported-media-type")


def test_a_body_that_is_too_large(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    large = json.dumps({"labels": LISTS, "model": "x" * settings.body_limit_bytes}).encode()
    problem(client.post("/generate", content=large, headers=JSON), 413, "content-too-large")
    chunks = (large[i : i + 65536] for i in range(0, len(large), 65536))  # without a Content-Length
    problem(client.post("/generate", content=chunks, headers=JSON), 413, "content-too-large")
    problem(client.post("/score", files={"file": large}), 413, "content-too-large")
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        (b"[[", {}, "not JSON"),
        (b'{"a": 1}', {}, "expected a list"),
        (b'[["red kube"]]', {}, 'did you mean "red cube"?'),
        (b"[]", {}, "at least one"),
        (b'[["red cube"]]', {"repeats": "0"}, "repeats"),
        (b'[["red cube"]]', {"repeats": str(LIMITS.max_repeats + 1)}, "repeats"),
        (b'[["red cube"]]', {"repeats": "ten"}, "repeats"),
        (b'[["red cube"]]', {"repeats": "2.5"}, "repeats"),
        (b'[["red cube"]]', {"model": "nobody"}, "model"),
        (b'[["red cube"]]', {"unheard": "of"}, "unheard"),
        (b'[["red cube"]]', {"seed": str(2**53 - 1), "repeats": "2"}, "seed"),
        (None, {"repeats": "2"}, "file"),
    ],
)
def test_forms_that_cannot_be_scored(
    client: httpx.Client, alive: JobStore, file: bytes | None, fields: dict[str, str], words: str
) -> None:
    files = {"file": ("test.json", file)} if file is not None else {"other": ("x", b"x")}
    assert words in problem(client.post("/score", data=fields, files=files), 422, "invalid-request")["detail"]
    assert nothing_is_queued(alive.connection)


def test_a_form_that_is_no_form(client: httpx.Client, alive: JobStore) -> None:
    broken = {"content-type": "multipart/form-data; boundary=x"}
    problem(client.post("/score", content=b"--y\r\n", headers=broken), 400, "bad-request")
    problem(client.post("/score", content=b"x", headers={"content-type": "multipart/form-data"}), 400, "bad-request")
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/jobs/nobody", 404, "unknown-job"),
        ("GET", "/jobs/nobody/grid.png", 404, "unknown-job"),
        ("GET", "/jobs/nobody/images/0.png", 404, "unknown-job"),
        ("GET", "/jobs/nobody/images/-1.png", 404, "unknown-job"),
        ("GET", "/jobs/nobody/images/one.png", 404, "unknown-job"),
        ("DELETE", "/jobs/nobody", 404, "unknown-job"),
        ("GET", "/nowhere", 404, "not-found"),
        ("PUT", "/generate", 405, "method-not-allowed"),
        ("GET", "/labels?model=nobody", 422, "invalid-request"),
    ],
)
def test_addresses_where_nothing_is(client: httpx.Client, method: str, path: str, status: int, slug: str) -> None:
    problem(client.request(method, path), status, slug)


def test_an_address_names_all_its_methods(client: httpx.Client) -> None:
    for path, methods in (("/jobs/nobody", "DELETE, GET"), ("/jobs", "GET"), ("/generate", "POST"), ("/", "GET, HEAD")):
        assert client.put(path).headers["allow"] == methods


def test_sixteen_and_a_half_steps_are_none_but_sixteen_point_zero_are(client: httpx.Client, alive: JobStore) -> None:
    body = {"labels": LISTS, "columns": 2.0, "guidance": 2, "seed": 7.0}
    job = client.post("/generate", json={**body, "steps": 16.0}, headers={"prefer": "respond-async"}).json()
    assert (job["options"]["steps"], job["options"]["guidance"], job["seed"]) == (16, 2.0, 7)
    for name, value in (("steps", 16.5), ("steps", True), ("steps", "16"), ("clip_x0", 1.0), ("seed", 1e300)):
        assert name in problem(client.post("/generate", json={**body, name: value}), 422, "invalid-request")["detail"]


@pytest.mark.parametrize("interval", ["[0.25, 0.75]", ["0.25", "0.75"]])
def test_a_list_in_a_form(client: httpx.Client, alive: JobStore, interval: str | list[str]) -> None:
    given = {"data": {"guidance_interval": interval, "steps": "4"}, "files": {"file": json.dumps(LISTS)}}
    job = client.post("/score", headers={"prefer": "respond-async"}, **given).json()  # type: ignore[arg-type]
    assert job["options"]["guidance_interval"] == [0.25, 0.75]


@pytest.mark.parametrize("field", [{"guidance_interval": "0.25"}, {"steps": "null"}, {"steps": ["1", "2"]}])
def test_a_field_of_a_form_that_is_no_value(client: httpx.Client, alive: JobStore, field: dict[str, Any]) -> None:
    answer = client.post("/score", data=field, files={"file": json.dumps(LISTS)})
    assert next(iter(field)) in problem(answer, 422, "invalid-request")["detail"]
    assert nothing_is_queued(alive.connection)


def test_without_a_worker_nothing_is_accepted(client: httpx.Client, connection: Redis) -> None:
    problem(client.get("/readyz"), 503, "no-worker")
    assert client.get("/healthz").json() == {"status": "ok"}
    response = client.post("/generate", json={"labels": LISTS})
    problem(response, 503, "no-worker")
    assert int(response.headers["retry-after"]) > 0
    problem(client.post("/score", json={"conditions": LISTS}), 503, "no-worker")
    assert nothing_is_queued(connection)


@pytest.mark.parametrize(
    ("path", "body"), [("/generate", {"labels": LISTS}), ("/score", {"conditions": LISTS})], ids=["generate", "score"]
)
def test_an_unknown_field_is_refused_with_what_is_known(
    client: httpx.Client, path: str, body: dict[str, object]
) -> None:
    found = problem(client.post(path, json={**body, "step": 3, "xyzzy": 4}), 422, "invalid-request")
    assert found["detail"] == "step: unknown; did you mean steps?"
    assert [error["type"] for error in found["errors"]] == ["extra_forbidden"] * 2
    assert found["errors"][1]["msg"].startswith("unknown; known are seed, steps, ")


@pytest.mark.parametrize("sent", ["application/x-www-form-urlencoded", None])
def test_json_of_another_type_is_refused_by_its_type(client: httpx.Client, sent: str | None) -> None:
    headers = {"content-type": sent} if sent else {}
    response = client.post("/generate", content=b'{"labels": [["red cube"]]}', headers=headers)
    found = problem(response, 422, "invalid-request")
    assert found["detail"] == f"content-type: {sent or 'none'}; wanted application/json or multipart/form-data"


def test_an_unknown_model_is_found_where_the_request_has_it(client: httpx.Client) -> None:
    found = problem(client.get("/labels", params={"model": "zz"}), 422, "invalid-request")
    assert found["errors"][0]["loc"] == ["query", "model"]
    found = problem(client.post("/generate", json={"labels": LISTS, "model": "zz"}), 422, "invalid-request")
    assert found["errors"][0]["loc"] == ["body", "model"]


def test_a_full_queue_says_when_to_come_again(settings: Settings, alive: JobStore) -> None:
    with serving(settings.model_copy(update={"max_queued_pictures": 5})) as client:
        # An empty queue takes any one request.
        first = submitted(client, labels=[["red cube"]] * 12)
        response = client.post("/generate", json={"labels": LISTS})
        assert problem(response, 429, "queue-full")["queued"] == 12
        assert response.headers["retry-after"] == "10"  # no rate is measured yet
        workers.announce(alive.connection, "w", {"pictures_per_s": 0.5}, lease_s=60)
        workers.announce(alive.connection, "v", {"pictures_per_s": 1.0}, lease_s=60)
        response = client.post("/score", json={"conditions": LISTS, "repeats": 1})
        problem(response, 429, "queue-full")
        assert response.headers["retry-after"] == "6"  # 12 + 2 - 5 pictures at 1.5 a second
        assert alive.connection.scard("labelgrid:open") == 1
        alive.cancel(first)  # its pictures wait no longer
        submitted(client)


def test_with_a_worker_it_is_ready(client: httpx.Client, alive: JobStore) -> None:
    assert client.get("/readyz").json() == {"status": "ready", "model": "toy", "workers": 1}


def test_a_full_redis_is_said_and_what_it_has_can_be_read(
    client: httpx.Client, alive: JobStore, connection: Redis
) -> None:
    job = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).json()
    connection.config_set("maxmemory", 1)
    try:
        response = client.post("/generate", json={"labels": LISTS})
        assert "Redis is full" in problem(response, 503, "unavailable")["detail"]
        assert response.headers["retry-after"] == "10"
        assert client.get(f"/jobs/{job['id']}").json()["status"] == "queued"
        assert [one["id"] for one in client.get("/jobs").json()["jobs"]] == [job["id"]]
        assert client.delete(f"/jobs/{job['id']}").json()["status"] == "cancelled"
    finally:
        connection.config_set("maxmemory", 0)


def test_without_a_model_or_redis_it_says_so(settings: Settings, tmp_path: Path) -> None:
    with serving(settings.model_copy(update={"storage": tmp_path})) as client:
        problem(client.get("/readyz"), 503, "no-model")
        problem(client.post("/generate", json={"labels": LISTS}), 503, "no-model")
        assert client.get("/models").json() == {"models": [], "problems": {}}
    with serving(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})) as client:
        problem(client.get("/readyz"), 503, "unavailable")
        problem(client.post("/generate", json={"labels": LISTS}), 503, "unavailable")


@pytest.mark.parametrize(
    ("vocabulary", "config", "reason"),
    [
        (("red cube",), {"sampling": {"steps": 0}}, "sampling.steps"),
        (("red cube",), {"sampling": [7]}, "sampling"),
        (("red cube",), {"sampling": {"sampler": "ddim", "guess": 1}}, "sampling.guess"),
        (("red cube", "red cube"), {}, "vocabulary"),
        ((), {}, "vocabulary"),
    ],
)
def test_a_foreign_checkpoint_is_refused_with_its_reason(
    settings: Settings, alive: JobStore, tmp_path: Path, vocabulary: tuple[str, ...], config: Body, reason: str
) -> None:
    weights = {"w": torch.zeros(1)}
    publish(tmp_path, "foreign", weights, kind="denoiser", vocabulary=vocabulary, config=config, training={})
    with serving(settings.model_copy(update={"storage": tmp_path})) as client:
        body = {"labels": [["red cube"]], "model": "foreign"}
        assert reason in problem(client.post("/generate", json=body), 422, "invalid-request")["detail"]
        models = client.get("/models").json()
        assert models["models"] == []
        assert reason in models["problems"]["foreign.safetensors"]
        promote(tmp_path, "foreign")
        assert reason in problem(client.post("/generate", json={"labels": [["red cube"]]}), 503, "no-model")["detail"]
        assert reason in problem(client.get("/labels"), 503, "no-model")["detail"]
    assert nothing_is_queued(alive.connection)


def test_labels_and_models(client: httpx.Client) -> None:
    assert client.get("/labels").json() == {"model": "toy", "labels": list(ICLEVR.names)}
    assert client.get("/labels?model=other").json()["model"] == "other"
    body = client.get("/models").json()
    assert [(model["name"], model["promoted"], model["labels"]) for model in body["models"]] == [
        ("other", False, 24),
        ("toy", True, 24),
    ]
    assert body["problems"] == {}


def test_prefer_respond_async(client: httpx.Client, alive: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("service.store.reader.JobReader.read_streams")  # what all who wait read
    response = client.post("/generate", json={"labels": LISTS, "seed": 7}, headers={"prefer": "respond-async"})
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert (job["status"], job["progress"], job["result"]) == ("queued", {"done": 0, "total": 2}, None)
    assert client.get(response.headers["location"]).json() == job
    assert problem(client.get(f"/jobs/{job['id']}/grid.png"), 409, "not-ready")["job_status"] == "queued"
    problem(client.get(f"/jobs/{job['id']}/images/1.png"), 409, "not-ready")
    problem(client.get(f"/jobs/{job['id']}/images/2.png"), 404, "unknown-picture")
    for index in ("-1", "one"):
        problem(client.get(f"/jobs/{job['id']}/images/{index}.png"), 422, "invalid-request")


@pytest.mark.parametrize(
    ("prefer", "accept", "preferences"),
    [
        ("wait=7", "application/json", Preferences(7, False, "wait=7")),
        ("respond-async, wait=7", "image/png", Preferences(7, True, "wait=7")),
        ('WAIT = "3"', "image/png;q=0.1, application/json", Preferences(3, False, "wait=3")),
        ("wait=31", "*/*", Preferences(30, False, "wait=31")),
        ("Respond-Async", "Image/PNG", Preferences(0, True, "respond-async")),
        ("wait=soon, handling=strict", "image/png", Preferences(30, True, None)),
        (None, "application/json", Preferences(30, False, None)),
    ],
)
def test_the_headers_say_what_a_client_prefers(
    settings: Settings, prefer: str | None, accept: str, preferences: Preferences
) -> None:
    assert asyncio.run(read_preferences(settings.model_copy(update={"wait_s": 30}), prefer, accept)) == preferences


def test_prefer_wait(client: httpx.Client, alive: JobStore) -> None:
    begun = time.monotonic()
    response = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "wait=1", "accept": "image/png"})
    assert response.status_code == 202
    assert 0.9 < time.monotonic() - begun < 5
    assert response.headers["preference-applied"] == "wait=1"


def answer_to_who_waits(client: httpx.Client, store: JobStore, end: Callable[[str], Any]) -> tuple[httpx.Response, str]:
    """What a POST that waits is answered when `end` ends its job, and the job's id."""
    responses = []
    waiting = threading.Thread(target=lambda: responses.append(client.post("/generate", json={"labels": LISTS})))
    waiting.start()
    while not (open_jobs := store.connection.smembers("labelgrid:open")):
        time.sleep(0.01)
    (job_id,) = (text(raw) for raw in open_jobs)
    end(job_id)
    waiting.join()
    return responses[0], job_id


def test_a_job_that_fails_is_a_problem_for_who_waits(client: httpx.Client, alive: JobStore) -> None:
    response, job_id = answer_to_who_waits(client, alive, lambda job_id: alive.fail(job_id, "picture 0: it is no good"))
    body = problem(response, 500, "job-failed")
    assert (body["detail"], body["job"]) == ("picture 0: it is no good", f"/jobs/{job_id}")
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]) == ("failed", "picture 0: it is no good")


def test_a_job_that_is_cancelled_is_a_problem_for_who_waits(client: httpx.Client, alive: JobStore) -> None:
    response, job_id = answer_to_who_waits(client, alive, lambda job_id: client.delete(f"/jobs/{job_id}"))
    assert problem(response, 409, "job-cancelled")["job"] == f"/jobs/{job_id}"
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"], job["result"]) == ("cancelled", None, None)
    assert job["finished_at"]


def test_a_job_is_cancelled_once(client: httpx.Client, alive: JobStore) -> None:
    job = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).json()
    response = client.delete(f"/jobs/{job['id']}")
    assert response.status_code == 200
    assert (response.json()["id"], response.json()["status"]) == (job["id"], "cancelled")
    body = problem(client.delete(f"/jobs/{job['id']}"), 409, "job-ended")
    assert body["job_status"] == "cancelled"


def submitted(client: httpx.Client, **fields: Any) -> str:
    """The id of a new job."""
    response = client.post("/generate", json={"labels": LISTS, **fields}, headers={"prefer": "respond-async"})
    assert response.status_code == 202, response.text
    job_id: str = response.json()["id"]
    return job_id


@pytest.mark.parametrize(("path", "field"), [("/generate", "labels"), ("/score", "conditions")])
def test_an_idempotency_key_stands_for_one_request(
    client: httpx.Client, alive: JobStore, path: str, field: str
) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}

    def ask(**fields: Any) -> httpx.Response:
        return client.post(path, json={field: LISTS, **fields}, headers=headers)

    first = ask()
    again = ask(steps=None)  # says the same
    assert (again.status_code, again.json()) == (202, first.json())
    for fields in ({"steps": 3}, {"seed": 1}, {field: LISTS[:1]}, {"columns": 2}):
        body = problem(ask(**fields), 422, "idempotency-key-reused")
        assert body["errors"][0]["loc"] == ["header", "Idempotency-Key"]
    assert alive.connection.scard("labelgrid:open") == 1
    headers["idempotency-key"] = "another"
    assert ask().json()["id"] != first.json()["id"]


def test_an_idempotency_key_holds_for_a_form_and_as_long_as_its_job(client: httpx.Client, alive: JobStore) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}

    def ask() -> str:
        files = {"file": ("test.json", json.dumps(LISTS))}  # each time with another boundary
        job_id: str = client.post("/score", files=files, headers=headers).json()["id"]
        return job_id

    job_id = ask()
    workers.withdraw(alive.connection, "w")  # what stands needs no worker
    assert ask() == job_id
    workers.announce(alive.connection, "w", {}, lease_s=60)
    alive.connection.delete(job_key(job_id))
    assert ask() != job_id


@pytest.mark.parametrize("how", ["generate", "score", "a form", "pictures", "v1"])
def test_an_idempotency_key_stands_for_its_job_whatever_became_of_the_models(
    settings: Settings, alive: JobStore, tmp_path: Path, how: str
) -> None:
    folder = shutil.copytree(settings.storage, tmp_path / "storage")
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}
    zipped, picture = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("0.png", picture.getvalue())
    form = {"file": json.dumps(LISTS[:1])}
    sent: dict[str, tuple[str, Body]] = {
        "generate": ("/generate", {"json": {"labels": LISTS, "model": "other"}}),
        "score": ("/score", {"json": {"conditions": LISTS, "model": "other"}}),
        "a form": ("/score", {"files": form, "data": {"model": "other"}}),
        "pictures": ("/score", {"files": {**form, "pictures": zipped.getvalue()}}),
        "v1": ("/v1/images/generations", {"json": {"prompt": "red cube", "model": "other"}}),
    }
    path, given = sent[how]
    with serving(settings.model_copy(update={"storage": folder, "wait_s": 0.0})) as client:

        def ask() -> str:
            job = client.post(path, headers=headers, **given).json()
            found: str = job["job"] if how == "v1" else job["id"]
            return found

        job = ask()
        shutil.rmtree(folder)
        folder.mkdir()
        assert ask() == job


@pytest.mark.parametrize("key", ["", "x" * 201])
def test_keys_that_cannot_be(client: httpx.Client, alive: JobStore, key: str) -> None:
    response = client.post("/generate", json={"labels": LISTS}, headers={"idempotency-key": key})
    problem(response, 422, "invalid-request")
    assert nothing_is_queued(alive.connection)


def test_jobs_are_listed_newest_first_in_pages_that_new_jobs_do_not_shift(
    client: httpx.Client, alive: JobStore
) -> None:
    assert client.get("/jobs").json() == {"jobs": [], "next": None}
    ids = []
    for _ in range(5):
        ids.append(submitted(client))
        time.sleep(0.002)  # times have milliseconds
    alive.cancel(ids[2])
    page = client.get("/jobs").json()
    assert ([job["id"] for job in page["jobs"]], page["next"]) == (ids[::-1], None)
    whole = client.get(f"/jobs/{ids[2]}").json()
    assert whole["labels"] == LISTS
    asked = ("labels", "layouts", "first", "trajectory", "columns")
    assert page["jobs"][2] == {name: value for name, value in whole.items() if name not in (*asked, "result")}
    seen, cursor = [], None
    for size in (2, 2, 1):
        page = client.get("/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        assert len(page["jobs"]) == size
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next"]
        submitted(client)
    assert (seen, cursor) == (ids[::-1], None)


def test_a_list_leaves_out_jobs_that_are_over(client: httpx.Client, alive: JobStore) -> None:
    first, second = submitted(client), submitted(client)
    alive.connection.delete(job_key(first))
    assert [job["id"] for job in client.get("/jobs").json()["jobs"]] == [second]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "cursor=x", "cursor=-", "limit=ten"])
def test_pages_that_cannot_be(client: httpx.Client, query: str) -> None:
    problem(client.get(f"/jobs?{query}"), 422, "invalid-request")


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int16)


def test_generate_waits_and_answers_with_the_finished_job(client: httpx.Client, working: Runner) -> None:
    response = client.post("/generate", json={"labels": LISTS, "seed": 7, "steps": 5, "sampler": "euler", "columns": 1})
    assert response.status_code == 200, response.text
    job = response.json()
    assert response.headers["content-location"] == f"/jobs/{job['id']}"
    assert job == client.get(f"/jobs/{job['id']}").json()
    assert (job["status"], job["kind"], job["seed"], job["model"]) == ("finished", "generate", 7, "toy")
    assert (job["options"]["steps"], job["options"]["sampler"]) == (5, "euler")
    assert job["progress"] == {"done": 2, "total": 2}
    result = job["result"]
    assert set(result) == {"accuracy", "exact_match", "f1", "grid_url", "pictures"}
    for i, picture in enumerate(result["pictures"]):
        assert picture["labels"] == LISTS[i]
        assert picture["seed"] == picture_seed(7, i)
        assert set(LISTS[i]) <= set(picture["scores"])
        assert 5 <= len(picture["scores"]) <= 5 + len(LISTS[i])
        assert list(picture["scores"].values()) == sorted(picture["scores"].values(), reverse=True)
        png = client.get(picture["url"])
        assert png.headers["content-type"] == "image/png"
        h, w, _ = pixels(png.content).shape
    grid = client.get(result["grid_url"])
    assert grid.headers["content-type"] == "image/png"
    assert pixels(grid.content).shape == (2 * h + 6, w + 4, 3)


def test_accept_png_answers_with_the_grid(client: httpx.Client, working: Runner) -> None:
    response = client.post("/generate", json={"labels": LISTS, "steps": 2}, headers={"accept": "image/png"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert client.get(response.headers["content-location"]).content == response.content


def test_a_picture_alone_is_its_own_grid_and_is_kept_once(
    client: httpx.Client, working: Runner, connection: Redis
) -> None:
    asked = client.post("/score", json={"conditions": [["red cube"]], "repeats": 3, "steps": 2}).json()
    picture = client.get(asked["result"]["pictures"][0]["url"])
    assert client.get(asked["result"]["grid_url"]).content == picture.content
    assert asked["result"]["pictures"][0]["url"].endswith(f"/{asked['result']['best']}.png")
    assert sorted(connection.hkeys(png_key(asked["id"]))) == [b"0", b"1", b"2", b"grid"]
    assert connection.hget(png_key(asked["id"]), "grid") == str(asked["result"]["best"]).encode()


@pytest.mark.parametrize(
    ("accept", "png"),
    [
        ("image/png;q=0.5, application/json", False),
        ("image/png, application/json;q=0.9", True),
        ("*/*", False),
        ("text/html", False),
        ("image/png;q=nonsense", False),
    ],
)
def test_accept_with_qualities(client: httpx.Client, working: Runner, accept: str, png: bool) -> None:
    response = client.post("/generate", json={"labels": LISTS, "steps": 1}, headers={"accept": accept})
    assert (response.headers["content-type"] == "image/png") == png


def test_the_same_seed_gives_the_same_pictures_alone_and_in_company(client: httpx.Client, working: Runner) -> None:
    body = {"labels": LISTS, "seed": 11, "steps": 8}
    alone = pixels(client.post("/generate", json=body, headers={"accept": "image/png"}).content)
    company: list[np.ndarray] = []

    def ask() -> None:
        company.append(pixels(client.post("/generate", json=body, headers={"accept": "image/png"}).content))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
        client.post("/generate", json={"labels": LISTS * 2, "steps": 5}, headers={"prefer": "respond-async"})
    for thread in threads:
        thread.join()
    assert all(np.abs(one - alone).max() <= 1 for one in company)
    another = client.post("/generate", json={**body, "seed": 12}, headers={"accept": "image/png"}).content
    assert np.abs(pixels(another) - alone).max() > 1


def test_a_seed_is_drawn_and_told(client: httpx.Client, working: Runner) -> None:
    first, second = (client.post("/generate", json={"labels": LISTS, "steps": 1}).json()["seed"] for _ in range(2))
    assert first != second


def test_score_as_json_and_as_a_form_give_the_same(client: httpx.Client, working: Runner) -> None:
    as_json = client.post("/score", json={"conditions": LISTS, "repeats": 3, "seed": 5, "steps": 3})
    assert as_json.status_code == 200, as_json.text
    files = {"file": ("test.json", json.dumps(LISTS))}
    fields = {"repeats": "3", "seed": "5", "steps": "3", "model": "toy"}
    as_form = client.post("/score", files=files, data=fields)
    assert as_form.status_code == 200, as_form.text
    result, other = as_json.json()["result"], as_form.json()["result"]
    assert result["repeats"] == other["repeats"]
    assert [repeat["seed"] for repeat in result["repeats"]] == [5, 6, 7]
    for name in ("accuracy", "exact_match", "f1"):
        values = [repeat[name] for repeat in result["repeats"]]
        expected = {"max": max(values), "mean": np.mean(values), "std": np.std(values)}
        assert result[name] == pytest.approx(expected)
    assert result["repeats"][result["best"]]["accuracy"] == result["accuracy"]["max"]
    shown = [picture["seed"] for picture in result["pictures"]]
    assert shown == [picture_seed(5 + result["best"], i) for i in range(2)]
    assert client.get(result["grid_url"]).headers["content-type"] == "image/png"
    single = client.post("/generate", json={"labels": LISTS, "seed": 6, "steps": 3}).json()["result"]
    assert {name: single[name] for name in ("accuracy", "exact_match", "f1")} == {
        name: result["repeats"][1][name] for name in ("accuracy", "exact_match", "f1")
    }


def test_of_a_score_the_verdicts_of_the_best_repeat_alone_are_read(client: httpx.Client, working: Runner) -> None:
    job = client.post("/score", json={"conditions": LISTS, "repeats": 3, "seed": 5, "steps": 3}).json()
    first = job["result"]["best"] * len(LISTS)
    others = {str(i): "no verdict" for i in range(3 * len(LISTS)) if not first <= i < first + len(LISTS)}
    working.store.connection.hset(verdicts_key(job["id"]), mapping=others)
    assert client.get(f"/jobs/{job['id']}").json() == job


def test_score_gives_what_the_trainer_gives(client: httpx.Client, working: Runner, settings: Settings) -> None:
    body = {"conditions": LISTS * 4, "repeats": 3, "seed": 5, "steps": 6, "guidance": 3.0}
    result = client.post("/score", json=body).json()["result"]
    denoiser = load_denoiser(resolve(settings.storage, None, "denoiser"))
    evaluator = load_evaluator(resolve(settings.storage, None, "evaluator"))
    options = SamplingOptions(steps=6, guidance=3.0)
    runs = [score_run(denoiser.stepper(), evaluator, LISTS * 4, options, 5 + r) for r in range(3)]
    figures = summary(runs)
    for name in ("accuracy", "exact_match", "f1"):
        assert result[name] == pytest.approx(figures[name])
        assert [repeat[name] for repeat in result["repeats"]] == pytest.approx([run[name] for run in figures["runs"]])
    assert result["repeats"][result["best"]]["seed"] == best(runs).seed


def test_another_model_can_be_asked_for(client: httpx.Client, working: Runner) -> None:
    job = client.post("/generate", json={"labels": LISTS, "model": "other", "steps": 1}).json()
    assert (job["status"], job["model"]) == ("finished", "other")


def test_what_is_over_is_gone(client: httpx.Client, working: Runner) -> None:
    job = client.post("/generate", json={"labels": LISTS, "steps": 1}).json()
    working.connection.delete(job_key(job["id"]), png_key(job["id"]))
    address = f"/jobs/{job['id']}"
    for path in ("", "/grid.png", "/images/0.png", "/events"):
        problem(client.get(address + path), 410, "expired-job")
    problem(client.delete(address), 410, "expired-job")
    working.connection.delete(tombstone_key(job["id"]))
    problem(client.get(address), 404, "unknown-job")
