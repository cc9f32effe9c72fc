"""/v1 with the `openai` package as it is: pictures, addresses, streams with previews, models, errors in its form."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image
from redis import Redis

import service.api.event_feed
from service.api.access.keys import hash_of, new_key
from service.settings import Settings
from service.store.connection import text
from service.store.jobs import JobStore
from service.store.keys import events_key, job_key
from service.worker.runner import Runner
from tests.conftest import serving

PROMPT = "a red cube and a blue sphere"


def openai_client(client: httpx.Client, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture
def ai(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai_client(client) as ai:
        yield ai


def test_pictures_are_those_of_generate(ai: openai.OpenAI, client: httpx.Client, working: Runner) -> None:
    answer = ai.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7, "steps": 3})
    assert answer.data is not None
    assert [image.revised_prompt for image in answer.data] == ["red cube, blue sphere"] * 2
    assert (answer.size, answer.output_format, answer.background) == ("16x16", "png", "opaque")
    assert abs(answer.created - time.time()) < 60
    body = {"labels": [["red cube", "blue sphere"]] * 2, "seed": 7, "steps": 3}
    job = client.post("/generate", json=body).json()
    for image, picture in zip(answer.data, job["result"]["pictures"], strict=True):
        assert image.b64_json is not None
        assert base64.b64decode(image.b64_json) == client.get(picture["url"]).content
    assert (answer.data[0].b64_json, answer.data[0].url) != (answer.data[1].b64_json, "")
    extra: Any = answer.model_extra
    assert extra["seed"] == 7
    assert client.get(extra["job"]).json()["result"]["accuracy"] == job["result"]["accuracy"]


def test_addresses_instead_of_pictures(ai: openai.OpenAI, client: httpx.Client, working: Runner) -> None:
    answer = ai.images.generate(
        prompt="gray cylinder", response_format="url", size="16x16", model="other", extra_body={"steps": 1}
    )
    assert answer.data is not None
    (image,) = answer.data
    assert image.b64_json is None
    assert image.url is not None
    assert image.url.startswith(str(client.base_url))
    assert Image.open(io.BytesIO(httpx.get(image.url).content)).size == (16, 16)


def work_on_all(connection: Redis, runner: Runner) -> threading.Thread:
    def work() -> None:
        while not (jobs := connection.smembers("labelgrid:open")):
            time.sleep(0.005)
        for job_id in jobs:
            while not connection.exists(f"labelgrid:job:{text(job_id)}:watched"):
                time.sleep(0.005)
            runner.run(text(job_id))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_a_stream_has_previews_and_then_the_picture(
    ai: openai.OpenAI, connection: Redis, settings: Settings, alive: JobStore, wanted: int
) -> None:
    runner = Runner(connection, settings.model_copy(update={"live_every_s": 0.0}), "w")
    worker = work_on_all(connection, runner)
    told = list(
        ai.images.generate(prompt=PROMPT, stream=True, partial_images=wanted, extra_body={"steps": 300, "seed": 1})
    )
    worker.join()
    *partial, completed = told
    assert isinstance(completed, ImageGenCompletedEvent)
    assert [event.partial_image_index for event in partial if isinstance(event, ImageGenPartialImageEvent)] == list(
        range(len(partial))
    )
    assert len(partial) == wanted
    assert (completed.size, completed.usage.total_tokens) == ("16x16", 0)
    images = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))) for event in told]
    assert all(image.size == (16, 16) for image in images)
    assert len({event.b64_json for event in told}) == len(told)  # each is further on than the one before


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_a_job_that_ends_otherwise_is_an_error(
    ai: openai.OpenAI, client: httpx.Client, alive: JobStore, how: str
) -> None:
    def end() -> None:
        for _ in range(2):
            while not (jobs := alive.connection.smembers("labelgrid:open")):
                time.sleep(0.005)
            job_id = text(next(iter(jobs)))
            _ = alive.fail(job_id, "it is no good") if how == "fails" else alive.cancel(job_id)

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(openai.APIStatusError) as caught:
        ai.images.generate(prompt=PROMPT)
    wanted = (500, "job_failed") if how == "fails" else (409, "job_cancelled")
    assert (caught.value.status_code, caught.value.code) == wanted
    with pytest.raises(openai.APIError, match="no good" if how == "fails" else "cancelled"):
        list(ai.images.generate(prompt=PROMPT, stream=True))
    thread.join()


@pytest.mark.parametrize("how", ["is gone", "cannot be read"])
def test_a_stream_without_an_end_ends_with_an_error(
    ai: openai.OpenAI, alive: JobStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(service.api.event_feed, "LOOK_AGAIN_MS", 50)
    told = ai.images.generate(prompt=PROMPT, stream=True)  # answered, and the job is made
    (job_id,) = map(text, alive.connection.smembers("labelgrid:open"))
    if how == "is gone":
        alive.connection.delete(job_key(job_id))
    else:
        alive.connection.set(events_key(job_id), "no stream")
    with pytest.raises(openai.APIError, match="are over" if how == "is gone" else "Redis does not answer"):
        list(told)


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        ({"prompt": "red kube"}, "prompt", 'did you mean "red cube"'),
        ({"prompt": ""}, "prompt", "names no object"),
        ({"prompt": PROMPT, "n": 0}, "n", "greater than"),
        ({"prompt": PROMPT, "n": 11}, "n", "less than"),
        ({"prompt": PROMPT, "size": "1024x1024"}, "size", "makes 16x16"),
        ({"prompt": PROMPT, "model": "dall-e-3"}, "model", "toy"),
        ({"prompt": PROMPT, "background": "transparent"}, "background", "opaque"),
        ({"prompt": PROMPT, "output_format": "webp"}, "output_format", "png"),
        ({"prompt": PROMPT, "stream": True, "n": 2}, "n", "one picture"),
        ({"prompt": PROMPT, "stream": True, "response_format": "url"}, "response_format", "b64_json"),
        ({"prompt": PROMPT, "extra_body": {"steps": 0}}, "steps", "greater than"),
        ({"prompt": PROMPT, "extra_body": {"wings": 2}}, "wings", "unknown; known are seed"),
    ],
)
def test_bad_requests(ai: openai.OpenAI, alive: JobStore, arguments: Any, param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        ai.images.generate(**arguments)
    assert (caught.value.param, caught.value.type, caught.value.code) == (
        param,
        "invalid_request_error",
        "invalid_request",
    )
    response = caught.value.response
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["detail"]) == (400, problem["error"]["message"])
    assert not alive.connection.exists("labelgrid:open")


def test_without_a_worker_or_in_time(
    ai: openai.OpenAI, connection: Redis, settings: Settings, client: httpx.Client
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ai.images.generate(prompt=PROMPT)
    assert (caught.value.status_code, caught.value.code) == (503, "no_worker")
    JobStore(connection, settings).say_alive("w", {})
    with serving(settings.model_copy(update={"wait_s": 0.0})) as other, openai_client(other) as impatient:
        with pytest.raises(openai.InternalServerError) as late:
            impatient.images.generate(prompt=PROMPT)
        assert (late.value.status_code, late.value.code) == (504, "not_in_time")
        assert other.get(late.value.response.json()["job"]).json()["status"] == "queued"


def test_models(ai: openai.OpenAI) -> None:
    models = list(ai.models.list())
    assert [(model.id, model.object, model.owned_by) for model in models] == [
        ("other", "model", "labelgrid"),
        ("toy", "model", "labelgrid"),
    ]
    assert ai.models.retrieve("toy") == models[1]
    with pytest.raises(openai.NotFoundError, match="nobody"):
        ai.models.retrieve("nobody")


def test_addresses_under_v1_that_are_none(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    answer = client.get("/v1/images/generations")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    answer = client.post("/v1/images/generations", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_json")
    assert "error" not in client.get("/jobs/nobody").json()


def test_a_key_is_needed_where_there_are_keys(settings: Settings, connection: Redis) -> None:
    key = new_key()
    with serving(settings.model_copy(update={"api_keys": f"me:{hash_of(key)}"})) as client:
        with openai_client(client, "another") as stranger:
            with pytest.raises(openai.AuthenticationError) as caught:
                stranger.models.list()
            assert (caught.value.code, caught.value.type) == ("no_key", "invalid_request_error")
        with openai_client(client, key) as known:
            assert len(list(known.models.list())) == 2
