"""Known waits: an open job says its place and when it will be done; a deadline refuses or ends what comes too late."""

import threading
import time
from datetime import datetime
from typing import Any

import httpx
import openai
import pytest

from service.client import ApiError, Client
from service.contract.recipe import example
from service.store import keys, workers
from service.store.jobs import JobStore
from service.worker.process import about
from service.worker.runner import Runner
from shared.options import SamplingOptions
from tests.service.api.answers import nothing_is_queued, problem, scoring, submitted
from tests.service.api.test_events import events
from tests.service.processes import until

COST = SamplingOptions().cost  # of a picture, in network rows
LISTS = [["red cube"]] * 10


def digest_of(client: httpx.Client) -> str:
    return next(str(model["digest"]) for model in client.get("/models").json()["models"] if model["promoted"])


def announce(alive: JobStore, client: httpx.Client, pictures_per_s: float) -> None:
    """Let a worker say that it draws so many pictures a second."""
    models = [{"name": "toy", "digest": digest_of(client), "rows_per_s": pictures_per_s * COST, "max_pictures": 32}]
    workers.announce(alive.connection, "w", {"models": models}, lease_s=60)


def seconds_left(job: dict[str, Any]) -> float:
    return datetime.fromisoformat(job["eta"]).timestamp() - time.time()


def test_an_open_job_says_its_place_and_when_it_will_be_done(client: httpx.Client, alive: JobStore) -> None:
    first = submitted(client, labels=LISTS)
    assert [client.get(f"/jobs/{first}").json()[name] for name in ("ahead", "eta")] == [None, None]  # nobody has a rate
    announce(alive, client, 2.0)
    answer = client.post("/generate", json={"labels": LISTS[:4]}, headers={"prefer": "respond-async"})
    job = answer.json()
    assert job["ahead"] == 4  # they take turns
    assert seconds_left(job) == pytest.approx((4 + 4) / 2, abs=2)
    assert int(answer.headers["retry-after"]) == pytest.approx(4, abs=2)
    found = client.get(f"/jobs/{first}").json()
    assert found["ahead"] == 4
    assert seconds_left(found) == pytest.approx((10 + 4) / 2, abs=2)
    alive.cancel(first)
    assert client.get(f"/jobs/{job['id']}").json()["ahead"] == 0
    assert client.get(f"/jobs/{first}").json()["eta"] is None


def test_a_deadline_that_cannot_be_met_is_refused_at_once(client: httpx.Client, alive: JobStore) -> None:
    body = {"labels": LISTS, "deadline_s": 4}
    later = {"prefer": "respond-async"}
    assert client.post("/generate", json=body, headers=later).status_code == 202  # nobody knows better
    announce(alive, client, 2.0)
    answer = client.post("/generate", json=body, headers=later)  # 20 pictures take 10 s
    found = problem(answer, 503, "deadline-exceeded")
    assert (found["ahead"], answer.headers["retry-after"]) == (10, "6")
    assert "in 10 s, after its deadline of 4 s" in found["detail"]
    assert alive.connection.zcard(keys.DEADLINES) == 1
    assert client.post("/generate", json={**body, "deadline_s": 11}, headers=later).status_code == 202
    problem(client.post("/score", **scoring([["red cube"]], deadline_s=1)), 503, "deadline-exceeded")
    requests = list[httpx.Request]()
    with Client(str(client.base_url), transport=Recording(requests)) as other, pytest.raises(ApiError) as refused:
        other.generate(LISTS, deadline_s=1)
    assert (refused.value.slug, len(requests)) == ("deadline-exceeded", 1)  # a retry would only be later


class Recording(httpx.HTTPTransport):
    def __init__(self, requests: list[httpx.Request]) -> None:
        super().__init__()
        self.requests = requests

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return super().handle_request(request)


def test_a_job_that_cannot_meet_its_deadline_any_more_ends_with_a_reason_of_its_own(
    client: httpx.Client, alive: JobStore
) -> None:
    announce(alive, client, 2.0)
    answers = list[httpx.Response]()
    ai = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=3, timeout=30)
    errors = list[openai.APIStatusError]()

    def ask() -> None:
        answers.append(client.post("/generate", json={"labels": LISTS, "deadline_s": 8}))

    def ask_openai() -> None:
        with pytest.raises(openai.InternalServerError) as raised:
            ai.images.generate(prompt="red cube", n=10, extra_body={"deadline_s": 60})
        errors.append(raised.value)

    waiting = [threading.Thread(target=one) for one in (ask, ask_openai)]
    for queued, thread in enumerate(waiting, 1):  # in this order: behind the other, the first would be refused at once
        thread.start()
        until(lambda queued=queued: alive.connection.zcard(keys.DEADLINES) == queued)
    alive.fail_overdue()
    assert alive.connection.zcard(keys.DEADLINES) == 2
    announce(alive, client, 0.1)  # the machine is busy with something else: 100 s
    alive.fail_overdue()
    for thread in waiting:
        thread.join()
    found = problem(answers[0], 503, "deadline-exceeded")
    assert "retry-after" not in answers[0].headers
    job = client.get(found["job"]).json()
    assert (job["status"], job["reason"]) == ("failed", "deadline")
    assert client.get("/jobs").json()["jobs"][0]["reason"] == "deadline"
    assert (errors[0].status_code, errors[0].response.headers["x-should-retry"]) == (503, "false")
    assert errors[0].code == "deadline_exceeded"


def test_a_deadline_in_the_past_ends_a_job_also_without_a_rate(client: httpx.Client, alive: JobStore) -> None:
    job_id = submitted(client, deadline_s=0.01)
    until(lambda: alive.fail_overdue() or client.get(f"/jobs/{job_id}").json()["reason"] == "deadline")


@pytest.mark.parametrize("deadline_s", [0, -1, 86_401, "soon"])
def test_deadlines_that_are_not_allowed(client: httpx.Client, alive: JobStore, deadline_s: Any) -> None:
    body = {"labels": LISTS, "deadline_s": deadline_s}
    assert "deadline_s" in problem(client.post("/generate", json=body), 422, "invalid-request")["detail"]
    assert nothing_is_queued(alive.connection)


def test_a_deadline_may_stand_beside_a_recipe(client: httpx.Client, alive: JobStore) -> None:
    recipe = example() | {"model": {"name": "toy", "digest": digest_of(client)}}
    announce(alive, client, 0.5)
    problem(client.post("/generate", json={"recipe": recipe, "deadline_s": 1}), 503, "deadline-exceeded")


def test_a_stream_tells_a_new_forecast(client: httpx.Client, alive: JobStore) -> None:
    announce(alive, client, 2.0)
    job_id = submitted(client, labels=LISTS)
    with client.stream("GET", f"/jobs/{job_id}/events") as response:
        stream = events(response)
        assert seconds_left(next(stream)["data"]) == pytest.approx(5, abs=2)
        announce(alive, client, 0.1)
        event = next(stream)
        assert (event["event"], event["data"]["ahead"]) == ("eta", 0)
        assert "id" not in event
        assert seconds_left(event["data"]) == pytest.approx(100, abs=5)
        alive.cancel(job_id)
        assert [one["event"] for one in stream][-1] == "end"


def test_a_worker_says_how_fast_it_is(client: httpx.Client, working: Runner) -> None:
    assert [model["rows_per_s"] for model in about(working)["models"]] == [0.0]
    client.post("/generate", json={"labels": LISTS[:2], "steps": 3})
    (loaded,) = working.models
    (model,) = about(working)["models"]
    assert loaded.engine.worked == pytest.approx(2 * SamplingOptions(steps=3).cost)
    assert model["rows_per_s"] == pytest.approx(loaded.rate.per_s, abs=0.001)
    assert model["rows_per_s"] > 0
