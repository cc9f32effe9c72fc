"""`until` in a request: pictures are drawn until they are exact, say so, and are drawn again from their recipes."""

from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from service.settings import Settings
from service.store.jobs import JobStore
from service.worker import models as worker_models
from service.worker.runner import Runner
from shared.options import attempt_seed, picture_seed
from tests.service.api.answers import LISTS, image, nothing_is_queued, problem, recipe_in, scoring

UNTIL = {"labels": LISTS, "seed": 7, "steps": 2, "until": "exact"}


def verdicts_of(client: httpx.Client, **changes: Any) -> list[dict[str, Any]]:
    answer = client.post("/generate", json={**UNTIL, **changes})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["result"]["pictures"]
    return found


def test_pictures_say_their_attempts_and_are_drawn_again_from_picture_and_grid(
    client: httpx.Client, working: Runner
) -> None:
    """The toy evaluator finds nothing exact, so the best attempt is kept."""
    job = client.post("/generate", json={**UNTIL, "attempts": 3}).json()
    assert (job["options"]["until"], job["options"]["attempts"]) == ("exact", 3)
    assert "kept" not in job["options"]
    assert job["result"]["selected"]
    kept = []
    for i, picture in enumerate(job["result"]["pictures"]):
        attempts = picture["attempts"]
        assert [one["seed"] for one in attempts] == [attempt_seed(picture_seed(7, i), n) for n in (1, 2, 3)]
        assert not any(one["exact"] for one in attempts)
        best = max(range(3), key=lambda n: (attempts[n]["f1"], attempts[n]["accuracy"]))
        kept.append(best + 1)
        assert {name: picture[name] for name in attempts[best]} == attempts[best]
        assert picture["kept"] == best + 1
        png = image(client, job, i)
        assert recipe_in(png)["options"]["kept"] == [best + 1]
        again = client.post("/generate/png", files={"file": png}).json()
        assert image(client, again) == png
        (shown,) = again["result"]["pictures"]
        assert again["result"]["selected"]  # these verdicts are of a choice, too
        assert (shown["kept"], shown["attempts"], shown["seed"]) == (best + 1, None, picture["seed"])
    grid = client.get(job["result"]["grid_url"]).content
    assert recipe_in(grid)["options"]["kept"] == kept
    again = client.post("/generate/png", files={"file": grid}).json()
    assert client.get(again["result"]["grid_url"]).content == grid
    assert [one["seed"] for one in again["result"]["pictures"]] == [one["seed"] for one in job["result"]["pictures"]]


def test_the_first_attempt_is_the_picture_of_a_plain_request_and_four_is_the_default(
    client: httpx.Client, working: Runner
) -> None:
    plain = client.post("/generate", json={name: UNTIL[name] for name in ("labels", "seed", "steps")}).json()
    assert not plain["result"]["selected"]
    assert all(one["kept"] is one["attempts"] is None for one in plain["result"]["pictures"])
    for picture, first in zip(verdicts_of(client), plain["result"]["pictures"], strict=True):
        assert len(picture["attempts"]) == 4
        assert picture["attempts"][0] == {name: first[name] for name in picture["attempts"][0]}


def test_what_is_exact_at_once_is_drawn_once(
    client: httpx.Client, working: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right(self: object, images: Tensor, **_: Any) -> Tensor:
        found = torch.zeros(len(images), 24)
        found[:, 0] = 1.0
        return found

    monkeypatch.setattr(worker_models.Evaluator, "probabilities", right)
    first = client.get("/labels").json()["labels"][0]
    (picture,) = verdicts_of(client, labels=[[first]])
    assert (picture["exact"], picture["kept"], len(picture["attempts"])) == (True, 1, 1)


def test_a_score_of_selected_pictures_is_refused(client: httpx.Client, alive: JobStore) -> None:
    body = problem(client.post("/score", **scoring(LISTS, until="exact")), 422, "selected-score")
    assert "selected" in body["detail"]
    problem(client.post("/score", **scoring(LISTS, attempts=3)), 422, "invalid-request")
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"until": None, "attempts": 3}, "attempts"),
        ({"attempts": 17}, "attempts"),
        ({"attempts": 0}, "attempts"),
        ({"until": "good"}, "until"),
        ({"kept": [1, 1]}, "kept"),
    ],
    ids=str,
)
def test_what_is_not_allowed(client: httpx.Client, alive: JobStore, changes: dict[str, Any], word: str) -> None:
    body = problem(client.post("/generate", json={**UNTIL, **changes}), 422, "invalid-request")
    assert word in body["detail"]
    assert nothing_is_queued(alive.connection)


def test_a_full_queue_counts_what_may_be_drawn(settings: Settings, alive: JobStore, client: httpx.Client) -> None:
    """The limits themselves are tested with the queue; of a request all attempts count, and then its pictures."""
    most = settings.max_queued_pictures
    later = {"prefer": "respond-async"}
    lists = [["red cube"]] * 256
    for _ in range((most - 4096) // 256):
        assert client.post("/generate", json={"labels": lists}, headers=later).status_code == 202
    many = {"labels": lists, "until": "exact", "attempts": 16}
    assert client.post("/generate", json=many, headers=later).status_code == 202
    body = problem(client.post("/generate", json=many, headers=later), 429, "queue-full")
    assert "4096 more" in body["detail"]
    assert client.post("/generate", json={"labels": lists}, headers=later).status_code == 202
