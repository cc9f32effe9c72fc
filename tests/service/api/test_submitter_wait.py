"""Requests that wait for their job: how they end, and that they hold nothing after a disconnect."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import service.api.app
import service.store.reader
from service.contract.recipe import example
from service.settings import Settings
from service.store import keys
from service.store.connection import text
from service.store.jobs import JobStore
from service.telemetry.metrics import REQUESTS_IN_WORK
from shared.checkpoint import read_info
from shared.registry import resolve
from tests.conftest import serving
from tests.service.api.answers import png_with, problem, submitted
from tests.service.processes import until

LISTS = [["red cube"]]


def until_waiting(store: JobStore, requests: int) -> None:
    """Return once so many requests have created their jobs and have no answer yet."""
    until(lambda: REQUESTS_IN_WORK._value.get() == requests and store.connection.zcard(keys.OPEN) >= requests)


def wait(client: httpx.Client, answers: list[int]) -> None:
    """Wait for a job of one's own, over a connection of one's own."""
    answers.append(httpx.post(f"{client.base_url}/generate", json={"labels": LISTS}, timeout=30).status_code)


def answer_to_a_waiting_post(
    client: httpx.Client, store: JobStore, end: Callable[[str], Any]
) -> tuple[httpx.Response, str]:
    """Return the answer to a POST whose job `end` ends, and the job's id."""
    responses = []
    waiting = threading.Thread(target=lambda: responses.append(client.post("/generate", json={"labels": LISTS})))
    waiting.start()
    (job_id,) = map(text, until(lambda: store.connection.zrange(keys.OPEN, 0, -1)))
    end(job_id)
    waiting.join()
    return responses[0], job_id


def test_a_job_that_fails_is_a_problem_for_a_waiting_client(client: httpx.Client, alive: JobStore) -> None:
    response, job_id = answer_to_a_waiting_post(
        client, alive, lambda job_id: alive.fail(job_id, "picture 0: it is no good")
    )
    body = problem(response, 500, "job-failed")
    assert (body["detail"], body["job"]) == ("picture 0: it is no good", f"/jobs/{job_id}")
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]) == ("failed", "picture 0: it is no good")


def test_a_job_that_is_cancelled_is_a_problem_for_a_waiting_client(client: httpx.Client, alive: JobStore) -> None:
    response, job_id = answer_to_a_waiting_post(client, alive, lambda job_id: client.delete(f"/jobs/{job_id}"))
    assert problem(response, 409, "job-cancelled")["job"] == f"/jobs/{job_id}"
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"], job["result"]) == ("cancelled", None, None)
    assert job["finished_at"]


@pytest.mark.parametrize("how", ["generate", "by its picture", "score", "a form", "v1"])
def test_a_request_stops_waiting_when_its_client_disconnects(
    client: httpx.Client, alive: JobStore, settings: Settings, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(service.store.reader, "LOOK_AGAIN_S", 14.0)  # no read ends by itself
    made_with = {"name": "toy", "digest": read_info(resolve(settings.storage, "toy", "denoiser")).digest}
    picture = png_with(json.dumps(example() | {"model": made_with}))
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        "generate": ("/generate", {"json": {"labels": LISTS}}),
        "by its picture": ("/generate/png", {"files": {"file": picture}}),
        "score": ("/score/conditions", {"json": {"conditions": LISTS}}),
        "a form": ("/score", {"files": {"file": json.dumps(LISTS)}}),
        "v1": ("/v1/images/generations", {"json": {"prompt": "red cube"}}),
    }
    path, given = requests[how]
    request = client.build_request("POST", path, **given)
    head = b"".join(b"%s: %s\r\n" % pair for pair in request.headers.raw)
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\n%s\r\n%s" % (path.encode(), head, request.read()))
        until_waiting(alive, 1)
    until_waiting(alive, 0)
    (job_id,) = map(text, alive.connection.zrange(keys.OPEN, 0, -1))
    assert client.get(f"/jobs/{job_id}").json()["status"] == "queued"  # the job goes on


def test_streams_leave_the_others_their_connections(
    settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.api.app, "MAX_CONNECTIONS", 4)
    with serving(settings) as client, contextlib.ExitStack() as stack:
        jobs = [submitted(client) for _ in range(6)]
        streams = [stack.enter_context(client.stream("GET", f"/jobs/{job_id}/events")) for job_id in jobs]
        lines = [stream.iter_lines() for stream in streams]
        assert {next(one) for one in lines} == {"event: job"}
        assert client.get("/jobs").status_code == 200
        for job_id, one in zip(jobs, lines, strict=True):  # one by one: each job is read once more at its end
            alive.cancel(job_id)
            assert "event: end" in "\n".join(one)


def test_waiting_clients_leave_the_others_their_connections(
    settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.api.app, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(service.store.reader, "LOOK_AGAIN_S", 14.0)  # no read ends by itself
    answers: list[int] = []
    with serving(settings) as client:
        threads = [threading.Thread(target=wait, args=(client, answers)) for _ in range(6)]
        for waiting, thread in enumerate(threads, 1):
            thread.start()
            until_waiting(alive, waiting)
        assert client.get("/jobs").status_code == 200
        jobs = [text(raw) for raw in alive.connection.zrange(keys.OPEN, 0, -1)]
        for count, job_id in enumerate(jobs, 1):  # one by one: each is read once more at its end
            alive.cancel(job_id)
            until(lambda count=count: len(answers) == count)
        for thread in threads:
            thread.join()
    assert answers == [409] * len(threads)


def test_clients_that_wait_share_one_read(settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hears of its own job's end, and several may wait for the same job."""
    monkeypatch.setattr(service.store.reader, "LOOK_AGAIN_S", 14.0)  # no read ends by itself
    body, headers = {"labels": LISTS}, {"idempotency-key": "one"}
    before = alive.connection.info("clients")["pubsub_clients"]  # of other tests
    with serving(settings) as client, ThreadPoolExecutor(4) as pool:
        own = [pool.submit(client.post, "/generate", json=body) for _ in range(2)]
        same = [pool.submit(client.post, "/generate", json=body, headers=headers) for _ in range(2)]
        until(lambda: REQUESTS_IN_WORK._value.get() == 4 and alive.connection.zcard(keys.OPEN) == 3)
        assert alive.connection.info("clients")["pubsub_clients"] == before + 1
        begun = time.monotonic()
        for job_id in map(text, alive.connection.zrange(keys.OPEN, 0, -1)):
            alive.fail(job_id, f"as {job_id} must")
        answers = [one.result().json() for one in (*own, *same)]
    assert time.monotonic() - begun < service.store.reader.LOOK_AGAIN_S
    assert all(answer["detail"] == f"as {answer['job'].rpartition('/')[2]} must" for answer in answers)
    assert len({answer["job"] for answer in answers}) == 3


def test_an_end_that_nobody_heard_of_is_seen_soon(
    settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its entry was lost in a failover."""
    monkeypatch.setattr(service.store.reader, "LOOK_AGAIN_S", 0.5)
    with serving(settings) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/generate", json={"labels": LISTS})
        until_waiting(alive, 1)
        (job_id,) = map(text, alive.connection.zrange(keys.OPEN, 0, -1))
        alive.connection.hset(keys.job(job_id), mapping={"status": "failed", "error": "quietly"})
        alive.connection.zrem(keys.OPEN, job_id)
        assert problem(waiting.result(), 500, "job-failed")["detail"] == "quietly"
