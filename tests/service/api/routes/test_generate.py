"""POST /generate: the finished job, and recipes: every PNG carries one, and it gives the same bytes again."""

import json
from typing import Any

import httpx
import pytest

from service.contract.recipe import example
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.options import picture_seed
from shared.registry import resolve
from tests.service.api.answers import LISTS, image, nothing_is_queued, pixels, png_with, problem, recipe_in, scoring


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
    assert set(result) == {"accuracy", "exact_match", "f1", "selected", "grid_url", "pictures"}
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


def test_a_seed_that_is_not_given_is_drawn_and_reported(client: httpx.Client, working: Runner) -> None:
    first, second = (client.post("/generate", json={"labels": LISTS, "steps": 1}).json()["seed"] for _ in range(2))
    assert first != second


THREE = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
UNLIKE_DEFAULTS = {
    "sampler": "ddim",
    "steps": 4,
    "spacing": "trailing",
    "guidance": 2.5,
    "guidance_interval": [0.125, 0.75],
    "eta": 0.5,
    "clip_x0": True,
}


def test_a_picture_carries_its_recipe(client: httpx.Client, working: Runner, settings: Settings) -> None:
    body = {"labels": THREE, "seed": 7, "model": "other", "columns": 2, **UNLIKE_DEFAULTS}
    result = client.post("/generate", json=body).json()["result"]
    denoiser = read_info(resolve(settings.storage, "other", "denoiser"))
    evaluator = read_info(resolve(settings.storage, None, "evaluator"))
    for i, shown in enumerate(result["pictures"]):
        recipe = recipe_in(client.get(shown["url"]).content)
        assert recipe["version"] == 1
        assert recipe["labels"] == [THREE[i]]
        assert (recipe["seed"], recipe["first"]) == (7, i)
        assert recipe["options"] == UNLIKE_DEFAULTS
        assert recipe["model"] == {"name": "other", "digest": denoiser.digest}
        assert recipe["evaluator"] == {"name": "toy-evaluator", "digest": evaluator.digest}
        (verdict,) = recipe["verdicts"]
        assert {name: verdict[name] for name in ("accuracy", "exact", "f1")} == {
            name: shown[name] for name in ("accuracy", "exact", "f1")
        }
        assert verdict["scores"] == pytest.approx(shown["scores"], abs=0.0051)
    grid = recipe_in(client.get(result["grid_url"]).content)
    assert (grid["labels"], grid["seed"], grid["first"], grid["columns"]) == (THREE, 7, 0, 2)
    assert [one["exact"] for one in grid["verdicts"]] == [shown["exact"] for shown in result["pictures"]]


def grid_of(client: httpx.Client, job: dict[str, Any]) -> bytes:
    return client.get(job["result"]["grid_url"]).raise_for_status().content


def test_a_job_has_all_fields_of_its_recipe(client: httpx.Client, working: Runner) -> None:
    whole = client.post("/generate", json={"labels": THREE, "seed": 7, "steps": 3, "columns": 2}).json()
    original = image(client, whole, 2)
    job = client.post("/generate/png", files={"file": original}).json()
    assert job["first"] == 2
    model = {"name": job["model"], "digest": job["digest"]}
    named = ("labels", "seed", "first", "options", "trajectory", "columns")
    recipe = {"version": 1, "model": model} | {name: job[name] for name in named}
    assert image(client, client.post("/generate", json={"recipe": recipe}).json(), 0) == original


def test_the_grid_of_a_scores_best_repeat_has_a_recipe(client: httpx.Client, working: Runner) -> None:
    job = client.post("/score", **scoring(THREE, repeats=4, seed=5, steps=3)).json()
    original = grid_of(client, job)
    recipe = recipe_in(original)
    assert recipe["seed"] == 5 + job["result"]["best"]
    again = client.post("/generate", json={"recipe": recipe}).json()
    assert grid_of(client, again) == original
    last = image(client, job, 11)  # repeat 3, picture 2, whether it was the best or not
    assert (recipe_in(last)["seed"], recipe_in(last)["first"]) == (8, 2)
    assert image(client, client.post("/generate/png", files={"file": last}).json()) == last


def test_a_recipe_names_its_checkpoint_by_digest(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    recipe = example() | {"model": {"name": "toy", "digest": "0" * 64}}
    body = problem(client.post("/generate", json={"recipe": recipe}), 422, "unknown-checkpoint")
    assert "0" * 64 in body["detail"]
    assert body["models"] == {
        name: read_info(resolve(settings.storage, name, "denoiser")).digest for name in ("other", "toy")
    }
    assert nothing_is_queued(alive.connection)


def recipe_of_toy(settings: Settings, **changes: Any) -> dict[str, Any]:
    digest = read_info(resolve(settings.storage, "toy", "denoiser")).digest
    return example() | {"model": {"name": "toy", "digest": digest}} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "recipe.version"),
        ({"version": True}, "recipe.version"),
        ({"seed": 2**53}, "recipe.seed"),
        ({"options": {"eta": 0.5}}, "recipe.options"),
        ({"labels": [["red kube"]]}, 'did you mean "red cube"?'),
        ({"first": 2**31, "labels": [["red cube"], ["gray cube"]]}, "last picture's position"),
        ({"pose": "standing"}, "recipe.pose"),
    ],
)
def test_an_invalid_recipe_is_refused(
    client: httpx.Client, alive: JobStore, settings: Settings, changes: dict[str, Any], words: str
) -> None:
    recipe = recipe_of_toy(settings, **changes)
    sent = client.post("/generate", json={"recipe": recipe})
    uploaded = client.post("/generate/png", files={"file": png_with(json.dumps(recipe))})
    for answer, expected in ((sent, words), (uploaded, words.removeprefix("recipe."))):
        detail = problem(answer, 422, "invalid-request")["detail"]
        assert expected in detail
        assert "Value error" not in detail  # as pydantic says it
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize("more", [{"labels": THREE}, {"seed": 7}])
def test_a_recipe_is_not_combined_with_other_fields(
    client: httpx.Client, alive: JobStore, settings: Settings, more: dict[str, Any]
) -> None:
    recipe = recipe_of_toy(settings)
    (name,) = more
    answer = client.post("/generate", json={"recipe": recipe, **more})
    assert f"without {name}" in problem(answer, 422, "invalid-request")["detail"]
    form = {name: json.dumps(value) for name, value in more.items()}
    answer = client.post("/generate/png", data=form, files={"file": png_with(json.dumps(recipe))})
    assert f"{name}: unknown" in problem(answer, 422, "invalid-request")["detail"]
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize(
    ("png", "words"),
    [
        (b"GIF89a" + b"\0" * 100, "not a PNG"),
        (png_with(None), "without a recipe"),
        (png_with("[" * 9_000), "recipe cannot be read"),
        (png_with(json.dumps(example()))[:60], "damaged"),
    ],
)
def test_a_png_without_a_valid_recipe_is_refused(client: httpx.Client, alive: JobStore, png: bytes, words: str) -> None:
    body = problem(client.post("/generate/png", files={"file": ("x.png", png)}), 422, "invalid-request")
    assert words in body["detail"]
    assert body["errors"][0]["loc"] == ["body", "file"]
    assert nothing_is_queued(alive.connection)


def test_an_idempotency_key_stands_for_one_recipe(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    headers = {"idempotency-key": "k", "prefer": "respond-async"}
    recipe = recipe_of_toy(settings)
    first = client.post("/generate", json={"recipe": recipe}, headers=headers).json()["id"]
    upload = {"file": png_with(json.dumps(recipe))}
    assert client.post("/generate/png", files=upload, headers=headers).json()["id"] == first
    other = client.post("/generate", json={"recipe": recipe | {"first": 1}}, headers=headers)
    problem(other, 422, "idempotency-key-reused")
