"""GET /labels, /models and /readyz."""

import httpx

from service.store.jobs import JobStore
from shared.vocabulary import ICLEVR


def test_with_a_worker_it_is_ready(client: httpx.Client, alive: JobStore) -> None:
    assert client.get("/readyz").json() == {"status": "ready", "model": "toy", "workers": 1}


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
