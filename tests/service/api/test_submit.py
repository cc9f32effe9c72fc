"""Whether the service is ready and accepts a job, what an Idempotency-Key stands for, and how requests wait."""

import io
import json
import shutil
import socket
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from starlette.datastructures import Headers

import service.api.app
import service.store.async_jobs
from service.api.access.api_keys import hash_of, new_key
from service.api.answers import Preferences, read_preferences
from service.settings import Settings
from service.store import keys, workers
from service.store.jobs import JobStore
from service.telemetry.metrics import REQUESTS, REQUESTS_IN_WORK
from service.worker.runner import Runner
from tests.conftest import running, serving
from tests.service.api.answers import LISTS, nothing_is_queued, png_with, problem, scoring, submitted
from tests.service.processes import until


def test_without_a_worker_nothing_is_accepted(client: httpx.Client, connection: Redis) -> None:
    problem(client.get("/readyz"), 503, "no-worker")
    response = client.post("/generate", json={"labels": LISTS})
    problem(response, 503, "no-worker")
    assert int(response.headers["retry-after"]) > 0
    assert nothing_is_queued(connection)


def test_with_workers_it_is_ready_and_says_what_they_have_loaded(client: httpx.Client, connection: Redis) -> None:
    assert client.get("/readyz").status_code == 503
    for device in ("cuda:1", "cuda:0"):
        about = {"device": device, "models": [{"name": "toy", "digest": "9f2c"}]}
        workers.announce(connection, device, about, lease_s=60)
    assert client.get("/readyz").json() == {
        "status": "ready",
        "model": "toy",
        "workers": 2,
        "storing": 2,
        "devices": [{"name": "cuda:0", "models": ["toy"]}, {"name": "cuda:1", "models": ["toy"]}],
    }


def test_with_a_redis_that_evicts_jobs_it_is_not_ready(client: httpx.Client, alive: JobStore) -> None:
    redis = alive.connection
    try:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        assert client.get("/readyz").status_code == 200  # without maxmemory nothing is evicted
        redis.config_set("maxmemory", "1gb")
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:labelgrid:problem:unavailable")
        assert answer.json()["detail"].startswith("Redis has maxmemory-policy allkeys-lru, which loses jobs")
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
        redis.config_set("maxmemory", "0")
    assert client.get("/readyz").status_code == 200


def test_a_worker_that_announces_itself_again_within_a_heartbeat_was_never_gone(
    settings: Settings, connection: Redis
) -> None:
    """As after the machine stood still for longer than a lease."""
    with serving(settings.model_copy(update={"lease_s": 4.0})) as client:
        back = threading.Timer(0.2, workers.announce, (connection, "paused", {}, 60))
        back.start()
        assert client.post("/generate", json={"labels": LISTS}, headers={"prefer": "wait=0"}).status_code == 202
        back.join()


def test_requests_wait_for_the_first_worker_if_they_may(settings: Settings, connection: Redis) -> None:
    """As with workers that something starts when there is work."""
    waiting = settings.model_copy(update={"accept_without_workers": True, "max_queued_pictures": 3})
    with serving(waiting) as client:
        assert client.get("/readyz").json()["workers"] == 0
        assert client.post("/generate", json={"labels": LISTS}, headers={"prefer": "wait=0"}).status_code == 202
        (job,) = client.get("/jobs").json()["jobs"]
        problem(client.post("/generate", json={"labels": LISTS}), 429, "queue-full")
        with running(connection, settings):
            until(lambda: client.get(f"/jobs/{job['id']}").json()["status"] == "finished")


def test_a_full_queue_says_when_to_retry(settings: Settings, alive: JobStore) -> None:
    with serving(settings.model_copy(update={"max_queued_pictures": 5})) as client:
        # An empty queue takes any one request.
        first = submitted(client, labels=[["red cube"]] * 12)
        response = client.post("/generate", json={"labels": LISTS})
        assert problem(response, 429, "queue-full")["queued"] == 12
        assert response.headers["retry-after"] == "10"  # no rate is measured yet
        workers.announce(alive.connection, "w", {"pictures_per_s": 0.5}, lease_s=60)
        workers.announce(alive.connection, "v", {"pictures_per_s": 1.0}, lease_s=60)
        response = client.post("/score", **scoring(LISTS, repeats=1))
        problem(response, 429, "queue-full")
        assert response.headers["retry-after"] == "6"  # 12 + 2 - 5 pictures at 1.5 a second
        assert alive.connection.zcard("labelgrid:deadlines") == 1
        alive.cancel(first)  # its pictures wait no longer
        submitted(client)


def test_one_owners_results_are_bounded_until_they_are_deleted(connection: Redis, settings: Settings) -> None:
    key = new_key()
    bounded = settings.model_copy(update={"api_keys": f"alice:{hash_of(key)}", "max_stored_pictures_per_owner": 3})
    workers.announce(connection, "w", {}, lease_s=60)
    headers = {"authorization": f"Bearer {key}", "prefer": "respond-async"}
    with serving(bounded) as client:

        def ask() -> httpx.Response:
            return client.post("/generate", json={"labels": [["red cube"]]}, headers=headers)

        job_id = ask().json()["id"]
        assert [ask().status_code for _ in range(2)] == [202, 202]
        refused = ask()
        assert problem(refused, 429, "quota-exceeded")["stored"] == 3
        assert 0 < int(refused.headers["retry-after"]) <= 3600
        assert client.post(f"/jobs/{job_id}/cancel", headers=headers).json()["status"] == "cancelled"
        assert client.delete(f"/jobs/{job_id}", headers=headers).json()["status"] == "cancelled"
        assert ask().status_code == 202


def test_a_full_redis_takes_no_job_and_its_jobs_can_be_read(
    client: httpx.Client, alive: JobStore, connection: Redis
) -> None:
    job_id = submitted(client)
    connection.config_set("maxmemory", 1)
    try:
        response = client.post("/generate", json={"labels": LISTS})
        assert "Redis is full" in problem(response, 503, "unavailable")["detail"]
        assert response.headers["retry-after"] == "10"
        assert [one["id"] for one in client.get("/jobs").json()["jobs"]] == [job_id]
        assert client.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    finally:
        connection.config_set("maxmemory", 0)


def test_without_a_model_or_redis_the_answer_says_so(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(settings.model_copy(update={"storage": tmp_path})) as client:
        problem(client.get("/readyz"), 503, "no-model")
        problem(client.post("/generate", json={"labels": LISTS}), 503, "no-model")
        assert client.get("/models").json() == {"models": [], "problems": {}}
    with serving(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})) as client:
        problem(client.get("/readyz"), 503, "unavailable")
        problem(client.post("/generate", json={"labels": LISTS}), 503, "unavailable")
    [line] = [vars(one) for one in caplog.records if one.levelname == "WARNING"]  # for both
    assert line["msg"] == "Redis is away or refuses writes"
    assert "127.0.0.1:1" in line["reason"]


def test_an_idempotency_key_stands_for_one_request(client: httpx.Client, alive: JobStore) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}

    def ask(**fields: Any) -> httpx.Response:
        return client.post("/generate", json={"labels": LISTS, **fields}, headers=headers)

    first = ask()
    again = ask(steps=None)  # says the same
    assert (again.status_code, again.json()) == (202, first.json())
    for fields in ({"seed": 1}, {"labels": LISTS[:1]}, {"columns": 2}):
        body = problem(ask(**fields), 422, "idempotency-key-reused")
        assert body["errors"][0]["loc"] == ["header", "Idempotency-Key"]
    assert alive.connection.zcard("labelgrid:deadlines") == 1
    headers["idempotency-key"] = "another"
    assert ask().json()["id"] != first.json()["id"]
    for key in ("", 201 * "k"):
        headers["idempotency-key"] = key
        assert problem(ask(), 422, "invalid-request")["errors"][0]["loc"] == ["header", "Idempotency-Key"]


def test_an_idempotency_key_holds_for_a_form_and_as_long_as_its_job(client: httpx.Client, alive: JobStore) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}

    def ask(lists: Any = LISTS) -> str:
        files = {"file": ("test.json", json.dumps(lists))}  # each time with another boundary
        job_id: str = client.post("/score", files=files, headers=headers).json()["id"]
        return job_id

    job_id = ask()
    workers.withdraw(alive.connection, "w")  # what stands needs no worker
    assert ask() == job_id
    workers.announce(alive.connection, "w", {}, lease_s=60)
    for lists in (LISTS, LISTS[:1]):  # now the key is free for another request, too
        alive.connection.delete(keys.job(job_id))
        before, job_id = job_id, ask(lists)
        assert job_id != before


def request_of(how: str, **fields: str) -> tuple[str, dict[str, Any]]:
    """Return the path and the content of a request of this kind."""
    form, zipped = {"file": json.dumps(LISTS[:1])}, io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("0.png", png_with(None))
    return {
        "generate": ("/generate", {"json": {"labels": LISTS, **fields}}),
        "pictures": ("/score", {"files": {**form, "pictures": zipped.getvalue()}}),
        "v1": ("/v1/images/generations", {"json": {"prompt": "red cube", **fields}}),
    }[how]


@pytest.mark.parametrize("how", ["generate", "pictures", "v1"])
def test_an_idempotency_key_finds_its_job_after_the_models_are_gone(
    settings: Settings, alive: JobStore, tmp_path: Path, how: str
) -> None:
    folder = shutil.copytree(settings.storage, tmp_path / "storage")
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}
    path, given = request_of(how, model="other")
    with serving(settings.model_copy(update={"storage": folder, "wait_s": 0.0})) as client:

        def ask() -> str:
            job = client.post(path, headers=headers, **given).json()
            found: str = job["job"] if how == "v1" else job["id"]
            return found

        job = ask()
        shutil.rmtree(folder)
        folder.mkdir()
        assert ask() == job


def until_waiting(store: JobStore, requests: int) -> None:
    """Return once so many requests have created their jobs and have no answer yet."""
    until(lambda: REQUESTS_IN_WORK._value.get() == requests and store.connection.zcard(keys.DEADLINES) >= requests)


@pytest.mark.parametrize("how", ["generate", "pictures", "v1"])
def test_a_request_stops_waiting_when_its_client_disconnects(
    client: httpx.Client, alive: JobStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(service.store.async_jobs, "LOOK_AGAIN_S", 14.0)  # no read ends by itself
    path, given = request_of(how)
    counted = REQUESTS.labels("POST", path, "499")
    before = counted._value.get()
    request = client.build_request("POST", path, **given)
    head = b"".join(b"%s: %s\r\n" % pair for pair in request.headers.raw)
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\n%s\r\n%s" % (path.encode(), head, request.read()))
        until_waiting(alive, 1)
    until(lambda: counted._value.get() == before + 1)
    (job_id,) = alive.connection.zrange(keys.DEADLINES, 0, -1)
    assert client.get(f"/jobs/{job_id}").json()["status"] == "queued"  # the job goes on


def test_clients_that_wait_share_one_connection(
    settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each hears of its own job's end, and several may wait for the same job."""
    monkeypatch.setattr(service.store.async_jobs, "LOOK_AGAIN_S", 14.0)  # no read ends by itself
    body, headers = {"labels": LISTS}, {"idempotency-key": "one"}
    before = alive.connection.info("clients")["pubsub_clients"]  # of other tests
    with serving(settings) as client, ThreadPoolExecutor(4) as pool:
        own = [pool.submit(client.post, "/generate", json=body) for _ in range(2)]
        same = [pool.submit(client.post, "/generate", json=body, headers=headers) for _ in range(2)]
        until(lambda: REQUESTS_IN_WORK._value.get() == 4 and alive.connection.zcard(keys.DEADLINES) == 3)
        assert alive.connection.info("clients")["pubsub_clients"] == before + 1
        begun = time.monotonic()
        for job_id in alive.connection.zrange(keys.DEADLINES, 0, -1):
            alive.fail(job_id, f"as {job_id} must")
        answers = [one.result().json() for one in (*own, *same)]
    assert time.monotonic() - begun < service.store.async_jobs.LOOK_AGAIN_S
    assert all(answer["detail"] == f"as {answer['job'].rpartition('/')[2]} must" for answer in answers)
    assert len({answer["job"] for answer in answers}) == 3


def test_an_end_that_nobody_heard_of_is_seen_soon(
    settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its entry was lost in a failover."""
    monkeypatch.setattr(service.store.async_jobs, "LOOK_AGAIN_S", 0.5)
    with serving(settings) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/generate", json={"labels": LISTS})
        until_waiting(alive, 1)
        (job_id,) = alive.connection.zrange(keys.DEADLINES, 0, -1)
        alive.connection.hset(keys.job(job_id), mapping={"status": "failed", "error": "quietly"})
        alive.connection.zrem(keys.DEADLINES, job_id)
        assert problem(waiting.result(), 500, "job-failed")["detail"] == "quietly"


@pytest.mark.parametrize(
    ("prefer", "accept", "preferences"),
    [
        ("wait=7", "application/json", Preferences(7, False, "wait=7")),
        ('WAIT = "3"', "image/png;q=0.1, application/json", Preferences(3, False, "wait=3")),
        ("wait=31", "*/*", Preferences(30, False, "wait=31")),
        ("Respond-Async; x=1", "Image/PNG", Preferences(0, True, "respond-async")),
        ("wait=soon, handling=strict", "image/png", Preferences(30, True, None)),
        ('foo="x, respond-async, y"', "", Preferences(30, False, None)),
        ("", "image/*", Preferences(30, False, None)),
    ],
)
def test_reading_the_headers(prefer: str, accept: str, preferences: Preferences) -> None:
    assert read_preferences(Headers({"prefer": prefer, "accept": accept}), 30) == preferences


def test_prefer_respond_async(client: httpx.Client, alive: JobStore) -> None:
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


def test_accept_png_answers_with_the_grid(client: httpx.Client, working: Runner) -> None:
    lines = [("accept", "text/html"), ("accept", "image/png")]
    response = client.post("/generate", json={"labels": LISTS, "steps": 2}, headers=lines)
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert client.get(response.headers["content-location"]).content == response.content
