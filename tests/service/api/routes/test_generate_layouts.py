"""Layouts: which are accepted, that the network gets them, and that recipes keep them."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from redis import Redis

from service.contract.recipe import example
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.diffusion.denoise import sample
from shared.diffusion.layouts import positions_at
from shared.diffusion.model import Denoiser, load_denoiser
from shared.options import SamplingOptions, picture_seed
from shared.pictures import read_png, to_uint8
from shared.vocabulary import ICLEVR
from tests.conftest import running, serving
from tests.service.api.answers import image, nothing_is_queued, problem, recipe_in

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
PLACES: list[Any] = [[{"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 0.375}], None]
QUICK = SamplingOptions(steps=2, guidance=1.0)
BODY: dict[str, Any] = {"labels": LISTS, "seed": 7, "steps": 2, "guidance": 1.0, "model": "placed"}


@pytest.fixture
def client(placed: Settings, connection: Redis) -> Iterator[httpx.Client]:
    with serving(placed) as client:
        yield client


@pytest.fixture
def worker(placed: Settings, connection: Redis, alive: JobStore) -> Iterator[Runner]:
    with running(connection, placed) as runner:
        yield runner


@pytest.fixture
def denoiser(placed: Settings) -> Denoiser:
    return load_denoiser(placed.storage / "placed.safetensors")


def generate(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    response = client.post("/generate", json={**BODY, **changes})
    assert response.status_code == 200, response.text
    job: dict[str, Any] = response.json()
    return job


def pixels(png: bytes) -> list[int]:
    flat: list[int] = read_png(png).flatten().tolist()
    return flat


def pixels_of(x: torch.Tensor) -> list[int]:
    flat: list[int] = to_uint8(x[None])[0].flatten().tolist()
    return flat


def test_the_network_gets_the_requested_layout(client: httpx.Client, worker: Runner, denoiser: Denoiser) -> None:
    plain, with_layout = generate(client), generate(client, layouts=PLACES)
    assert (plain["layouts"], with_layout["layouts"]) == (None, PLACES)
    assert pixels(image(client, plain, 0)) != pixels(image(client, with_layout, 0))
    assert image(client, plain, 1) == image(client, with_layout, 1)  # its layout is null

    stepper = denoiser.stepper()
    points = [(point["x"], point["y"]) for point in PLACES[0]]
    positions = positions_at(ICLEVR.encode(LISTS[0]), points, len(ICLEVR))
    row = stepper.new_row(ICLEVR.multi_hot(LISTS[0]), QUICK, picture_seed(7, 0), positions)
    while not row.done:
        stepper.step([row])
    without = sample(stepper, torch.tensor([ICLEVR.multi_hot(LISTS[0])]), QUICK, [picture_seed(7, 0)])[0]
    for job, wanted in ((with_layout, row.x), (plain, without)):
        assert pixels(image(client, job, 0)) == pixels_of(wanted)


def test_a_recipe_keeps_the_layout_and_generates_the_picture_again(client: httpx.Client, worker: Runner) -> None:
    job = generate(client, layouts=PLACES, trajectory=2)
    grid = client.get(job["result"]["grid_url"]).content
    assert recipe_in(grid)["layouts"] == PLACES
    first, second = (image(client, job, i) for i in range(2))
    assert recipe_in(first)["layouts"] == PLACES[:1]
    assert "layouts" not in recipe_in(second)
    for original in (first, second):
        again = client.post("/generate/png", files={"file": original}).json()
        assert image(client, again) == original
    again = client.post("/generate/png", files={"file": grid}).json()
    assert client.get(again["result"]["grid_url"]).content == grid
    plain = generate(client, layouts=[None, None])
    assert plain["layouts"] is None
    assert "layouts" not in recipe_in(client.get(plain["result"]["grid_url"]).content)


@pytest.mark.parametrize(
    ("layouts", "where", "message"),
    [
        (PLACES[:1], ["layouts"], "1 layouts; wanted 2, one for each label list, or null"),
        ([], ["layouts"], "0 layouts; wanted 2"),
        ([PLACES[0], PLACES[0]], ["layouts", 1], "layouts.1: 2 points; wanted 1, one for each label"),
        ([[], None], ["layouts", 0], "0 points; wanted 2"),
        ([[{"x": 1.01, "y": 0.5}] * 2, None], ["layouts", 0, 0, "x"], "less than or equal to 1"),
        ([[{"x": 0.5, "y": -0.1}] * 2, None], ["layouts", 0, 0, "y"], "greater than or equal to 0"),
        ([None, [{"x": 0.5}]], ["layouts", 1, 0, "y"], "Field required"),
        ([None, [{"x": "0.5", "y": 0.5}]], ["layouts", 1, 0, "x"], "valid number"),
        ([None, [{"x": 0.5, "y": 0.5, "z": 0.5}]], ["layouts", 1, 0, "z"], "unknown; known are x, y"),
        ([None, [[0.5, 0.5]]], ["layouts", 1, 0], "should be an object"),
        ("left", ["layouts"], "valid list"),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_valid_is_a_problem(
    client: httpx.Client, alive: JobStore, layouts: Any, where: list[Any], message: str
) -> None:
    found = problem(client.post("/generate", json={**BODY, "layouts": layouts}), 422, "invalid-request")
    assert message in found["detail"]
    assert found["errors"][0]["loc"] == ["body", *where]
    assert nothing_is_queued(alive.connection)


def test_models_say_whether_they_take_layouts_and_the_others_refuse_one(client: httpx.Client, alive: JobStore) -> None:
    known = {model["name"]: model["positions"] for model in client.get("/models").json()["models"]}
    assert known == {"other": False, "placed": True, "toy": False}
    body = {**BODY, "layouts": [None, [{"x": 0.5, "y": 0.5}]], "model": "toy"}
    found = problem(client.post("/generate", json=body), 422, "invalid-request")
    assert found["detail"] == "layouts.1: the model toy takes no layouts; GET /models lists those with `positions`"
    assert found["entry"] == 1
    response = client.post("/generate", json={**body, "layouts": [None, None]}, headers={"prefer": "respond-async"})
    assert response.status_code == 202
    recipe = {"recipe": {"version": 1}, "layouts": PLACES}
    refused = problem(client.post("/generate", json=recipe), 422, "invalid-request")
    assert "a recipe must be sent without" in refused["detail"]


def test_a_recipes_layouts_are_checked_too(client: httpx.Client, alive: JobStore, denoiser: Denoiser) -> None:
    recipe = example() | {"model": {"name": "placed", "digest": denoiser.info.digest}}
    recipe |= {"labels": LISTS, "layouts": PLACES[:1]}
    found = problem(client.post("/generate", json={"recipe": recipe}), 422, "invalid-request")
    assert found["detail"].startswith("recipe.layouts: 1 layouts; wanted 2")
