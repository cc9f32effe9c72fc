"""Whether a job is accepted: without workers, models, Redis or room, and when an Idempotency-Key is used again."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from redis import Redis

from service.api.access.keys import hash_of, new_key
from service.settings import Settings
from service.store import keys, workers
from service.store.jobs import JobStore
from tests.conftest import running, serving
from tests.service.api.answers import LISTS, Body, nothing_is_queued, problem, submitted
from tests.service.processes import until


def test_without_a_worker_nothing_is_accepted(client: httpx.Client, connection: Redis) -> None:
    problem(client.get("/readyz"), 503, "no-worker")
    assert client.get("/healthz").json() == {"status": "ok"}
    response = client.post("/generate", json={"labels": LISTS})
    problem(response, 503, "no-worker")
    assert int(response.headers["retry-after"]) > 0
    problem(client.post("/score/conditions", json={"conditions": LISTS}), 503, "no-worker")
    assert nothing_is_queued(connection)


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
        response = client.post("/score/conditions", json={"conditions": LISTS, "repeats": 1})
        problem(response, 429, "queue-full")
        assert response.headers["retry-after"] == "6"  # 12 + 2 - 5 pictures at 1.5 a second
        assert alive.connection.zcard("labelgrid:deadlines") == 1
        alive.cancel(first)  # its pictures wait no longer
        submitted(client)


def test_one_owner_cannot_fill_the_queue_for_the_others(connection: Redis, settings: Settings) -> None:
    api_keys = {name: new_key() for name in ("alice", "bob")}
    listed = ",".join(f"{name}:{hash_of(key)}" for name, key in api_keys.items())
    update = {"api_keys": listed, "max_queued_pictures_per_owner": 5, "max_queued_pictures": 8}
    bounded = settings.model_copy(update=update)
    workers.announce(connection, "w", {"pictures_per_s": 0.5}, lease_s=60)
    with serving(bounded) as client:

        def ask(name: str, pictures: int) -> httpx.Response:
            headers = {"authorization": f"Bearer {api_keys[name]}", "prefer": "respond-async"}
            return client.post("/generate", json={"labels": [["red cube"]] * pictures}, headers=headers)

        assert ask("alice", 4).status_code == 202
        refused = ask("alice", 3)
        assert (refused.status_code, refused.json()["type"]) == (429, "urn:labelgrid:problem:queue-full")
        assert "4 pictures of yours are waiting" in refused.json()["detail"]
        assert refused.headers["retry-after"] == "4"  # two too many, one every two seconds
        assert ask("bob", 3).status_code == 202
        assert ask("bob", 2).status_code == 429  # the queue as a whole
        assert [ask(name, 1).status_code for name in api_keys] == [202, 429]


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
        for _ in range(2):  # cancelled, then deleted with its request
            assert client.delete(f"/jobs/{job_id}", headers=headers).json()["status"] == "cancelled"
        assert ask().status_code == 202


def test_a_full_redis_takes_no_job_and_its_jobs_can_be_read(
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


@pytest.mark.parametrize(("path", "field"), [("/generate", "labels"), ("/score/conditions", "conditions")])
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
    assert alive.connection.zcard("labelgrid:deadlines") == 1
    headers["idempotency-key"] = "another"
    assert ask().json()["id"] != first.json()["id"]


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


@pytest.mark.parametrize("how", ["generate", "score", "a form", "pictures", "v1"])
def test_an_idempotency_key_finds_its_job_after_the_models_are_gone(
    settings: Settings, alive: JobStore, tmp_path: Path, how: str
) -> None:
    folder = shutil.copytree(settings.storage, tmp_path / "storage")
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}
    zipped, picture = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("0.png", picture.getvalue())
    form = {"file": json.dumps(LISTS[:1])}
    requests: dict[str, tuple[str, Body]] = {
        "generate": ("/generate", {"json": {"labels": LISTS, "model": "other"}}),
        "score": ("/score/conditions", {"json": {"conditions": LISTS, "model": "other"}}),
        "a form": ("/score", {"files": form, "data": {"model": "other"}}),
        "pictures": ("/score", {"files": {**form, "pictures": zipped.getvalue()}}),
        "v1": ("/v1/images/generations", {"json": {"prompt": "red cube", "model": "other"}}),
    }
    path, given = requests[how]
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
def test_idempotency_keys_of_the_wrong_length(client: httpx.Client, alive: JobStore, key: str) -> None:
    response = client.post("/generate", json={"labels": LISTS}, headers={"idempotency-key": key})
    problem(response, 422, "invalid-request")
    assert nothing_is_queued(alive.connection)
