"""GET /labels, /models and /readyz."""

import httpx

from service.store.jobs import JobStore
from shared.vocabulary import ICLEVR


def test_with_a_worker_it_is_ready(client: httpx.Client, alive: JobStore) -> None:
    assert client.get("/readyz").json() == {"status": "ready", "model": "toy", "workers": 1}


def test_labels_and_models(client: httpx.Client) -> None:
    assert client.get("/labels").json() == {"model": "toy", "labels": list(ICLEVR.names)}
    assert client.get("/labels?model=other").json()["model"] == "other"
    body = client.get("/models").json()
    assert [(model["name"], model["promoted"], model["labels"]) for model in body["models"]] == [
        ("other", False, 24),
        ("toy", True, 24),
    ]
    assert body["problems"] == {}
