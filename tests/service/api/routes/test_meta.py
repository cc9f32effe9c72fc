"""GET /labels, /models and /readyz."""

import httpx
from redis import Redis

from service.store import workers
from service.store.jobs import JobStore
from shared.vocabulary import ICLEVR


def test_with_workers_it_is_ready_and_says_what_they_have_loaded(client: httpx.Client, connection: Redis) -> None:
    assert client.get("/readyz").status_code == 503
    for device in ("cuda:1", "cuda:0"):
        about = {"device": device, "models": [{"name": "toy", "digest": "9f2c"}]}
        workers.announce(connection, device, about, lease_s=60)
    assert client.get("/readyz").json() == {
        "status": "ready",
        "model": "toy",
        "workers": 2,
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


def test_labels_and_models(client: httpx.Client) -> None:
    labels = client.get("/labels").json()
    assert (labels["model"], labels["labels"], labels["picture"]) == ("toy", list(ICLEVR.names), [16, 16])
    assert client.get("/labels?model=other").json()["model"] == "other"
    body = client.get("/models").json()
    assert [(model["name"], model["promoted"], model["labels"]) for model in body["models"]] == [
        ("other", False, 24),
        ("toy", True, 24),
    ]
    assert body["problems"] == {}
