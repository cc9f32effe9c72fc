"""POST /generate: the finished job, and the seeds that make its pictures reproducible."""

import threading

import httpx
import numpy as np

from service.worker.runner import Runner
from shared.options import picture_seed
from tests.service.api.answers import LISTS, pixels


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


def test_the_same_seed_gives_the_same_pictures_alone_and_batched(client: httpx.Client, working: Runner) -> None:
    body = {"labels": LISTS, "seed": 11, "steps": 8}
    alone = pixels(client.post("/generate", json=body, headers={"accept": "image/png"}).content)
    batched: list[np.ndarray] = []

    def ask() -> None:
        batched.append(pixels(client.post("/generate", json=body, headers={"accept": "image/png"}).content))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
        client.post("/generate", json={"labels": LISTS * 2, "steps": 5}, headers={"prefer": "respond-async"})
    for thread in threads:
        thread.join()
    assert all(np.abs(one - alone).max() <= 1 for one in batched)
    another = client.post("/generate", json={**body, "seed": 12}, headers={"accept": "image/png"}).content
    assert np.abs(pixels(another) - alone).max() > 1


def test_a_seed_that_is_not_given_is_drawn_and_reported(client: httpx.Client, working: Runner) -> None:
    first, second = (client.post("/generate", json={"labels": LISTS, "steps": 1}).json()["seed"] for _ in range(2))
    assert first != second


def test_a_model_can_be_chosen_by_name(client: httpx.Client, working: Runner) -> None:
    job = client.post("/generate", json={"labels": LISTS, "model": "other", "steps": 1}).json()
    assert (job["status"], job["model"]) == ("finished", "other")
