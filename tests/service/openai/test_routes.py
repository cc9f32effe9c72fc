"""/v1 used with OpenAI's own client: pictures, addresses, models, and errors in its form."""

import base64
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from redis import Redis

from service.api.access.api_keys import hash_of, new_key
from service.settings import Settings
from service.store import workers
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.conftest import serving

PROMPT = "a red cube and a blue sphere"


def openai_client(client: httpx.Client, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture
def ai(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai_client(client) as ai:
        yield ai


def test_pictures_equal_those_of_generate(ai: openai.OpenAI, client: httpx.Client, working: Runner) -> None:
    """Whatever size is asked for: they stay as they were sampled."""
    asked: Any = {"prompt": PROMPT, "n": 2, "extra_body": {"seed": 7, "steps": 3}}
    inline = ai.images.generate(**asked, size="1536x1024", stream=False, partial_images=0)
    linked = ai.images.generate(**asked, response_format="url", stream=None, partial_images=None)
    job = client.post("/generate", json={"labels": [["red cube", "blue sphere"]] * 2, "seed": 7, "steps": 3}).json()
    pictures = [client.get(picture["url"]).content for picture in job["result"]["pictures"]]
    assert pictures[0] != pictures[1]
    assert inline.data is not None
    assert linked.data is not None
    assert [base64.b64decode(image.b64_json or "") for image in inline.data] == pictures
    assert [client.get(image.url or "").content for image in linked.data] == pictures
    assert [(image.url, image.revised_prompt) for image in inline.data] == [(None, "red cube, blue sphere")] * 2
    assert (inline.size, inline.output_format, inline.background) == ("16x16", "png", "opaque")
    assert abs(inline.created - time.time()) < 60
    extra: Any = inline.model_extra
    assert extra["seed"] == 7
    assert client.get(extra["job"]).json()["result"]["accuracy"] == job["result"]["accuracy"]


def test_selected_pictures_say_so(ai: openai.OpenAI, working: Runner) -> None:
    """The toy evaluator finds nothing exact."""
    asked: Any = {"prompt": PROMPT, "n": 2, "extra_body": {"until": "exact", "attempts": 2, "steps": 2}}
    answer = ai.images.generate(**asked)
    assert (answer.model_extra or {})["selected"] is True
    assert [image.model_extra for image in answer.data or []] == [{"exact": False, "attempts": 2}] * 2
    with pytest.raises(openai.BadRequestError, match="attempts"):
        ai.images.generate(prompt=PROMPT, extra_body={"attempts": 2})


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_a_failed_or_cancelled_job_is_an_error_that_is_not_retried(
    ai: openai.OpenAI, client: httpx.Client, alive: JobStore, how: str
) -> None:
    answered = threading.Event()

    def end() -> None:
        while not answered.wait(0.005):
            for job_id in alive.connection.zrange("labelgrid:deadlines", 0, -1):
                _ = alive.fail(job_id, "picture 0: it is broken") if how == "fails" else alive.cancel(job_id)

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(openai.APIStatusError, match="broken" if how == "fails" else "cancelled") as caught:
        ai.with_options(max_retries=1).images.generate(prompt=PROMPT)
    answered.set()
    thread.join()
    wanted = (500, "job_failed") if how == "fails" else (409, "job_cancelled")
    assert (caught.value.status_code, caught.value.code) == wanted
    assert len(client.get("/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        ({"prompt": "red kube"}, "prompt", 'did you mean "red cube"'),
        ({"prompt": PROMPT, "n": 11}, "n", "less than"),
        ({"prompt": PROMPT, "model": "dall-e-3"}, "model", "toy"),
        ({"prompt": PROMPT, "output_format": "webp"}, "output_format", "png"),
        ({"prompt": PROMPT, "stream": True}, "stream", "follow the job at /jobs/{id}/events"),
        ({"prompt": PROMPT, "partial_images": 2}, "partial_images", "follow the job at /jobs/{id}/events"),
        ({"prompt": PROMPT, "extra_body": {"wings": 2}}, "wings", "unknown; known are .*seed"),
    ],
)
def test_bad_requests_are_400_with_the_parameter(
    ai: openai.OpenAI, alive: JobStore, arguments: Any, param: str | None, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        ai.images.generate(**arguments)
    found = (caught.value.param, caught.value.type, caught.value.code)
    assert found == (param, "invalid_request_error", "invalid_request")
    response = caught.value.response
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["detail"]) == (400, problem["error"]["message"])
    assert not alive.connection.exists("labelgrid:deadlines")


def test_no_worker_is_503_and_a_slow_job_504(
    ai: openai.OpenAI, connection: Redis, settings: Settings, client: httpx.Client
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ai.images.generate(prompt=PROMPT)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (503, "no_worker", "server_error")
    workers.announce(connection, "w", {}, 60)
    with serving(settings.model_copy(update={"wait_s": 0.0})) as other, openai_client(other) as impatient:
        with pytest.raises(openai.InternalServerError) as late:
            impatient.with_options(max_retries=1).images.generate(prompt=PROMPT)
        assert (late.value.status_code, late.value.code) == (504, "not_in_time")
        assert other.get(late.value.response.json()["job"]).json()["status"] == "queued"
        assert len(other.get("/jobs").json()["jobs"]) == 1  # the client has not retried


def test_models_are_listed_and_shown(ai: openai.OpenAI) -> None:
    models = list(ai.models.list())
    assert [(model.id, model.object, model.owned_by) for model in models] == [
        ("other", "model", "labelgrid"),
        ("toy", "model", "labelgrid"),
    ]
    assert ai.models.retrieve("toy") == models[1]
    with pytest.raises(openai.NotFoundError, match="nobody"):
        ai.models.retrieve("nobody")


def test_unknown_addresses_methods_and_bodies_get_openais_error(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    answer = client.get("/v1/images/generations")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    answer = client.post("/v1/images/generations", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_json")
    assert "error" not in client.get("/jobs/nobody").json()


def test_a_service_with_keys_needs_a_key_and_has_a_rate_limit(settings: Settings, connection: Redis) -> None:
    key = new_key()
    access = {"api_keys": f"me:{hash_of(key)}", "rate_limit": "1/hour"}
    with serving(settings.model_copy(update=access)) as client:
        with openai_client(client, "another") as stranger:
            with pytest.raises(openai.AuthenticationError) as caught:
                stranger.models.list()
            assert (caught.value.code, caught.value.type) == ("no_key", "invalid_request_error")
        with openai_client(client, key) as known:
            assert len(list(known.models.list())) == 2
            with pytest.raises(openai.RateLimitError) as limited:
                known.models.list()
            assert (limited.value.code, limited.value.type) == ("too_many_requests", "rate_limit_error")
