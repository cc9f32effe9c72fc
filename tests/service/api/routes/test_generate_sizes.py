"""Pictures that are neither square nor of the size that is sampled: each way of getting, repeating and scoring them."""

import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from redis import Redis
from torch import Tensor

from service.client import Client, Point
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator
from shared.options import SamplingOptions, picture_seed
from shared.pictures import marked_grid, read_png, sheet, to_uint8
from shared.vocabulary import ICLEVR
from tests.conftest import running, serving
from tests.service.api.answers import image, recipe_in
from tests.service.api.uploads.zips import zipped
from tests.toy_checkpoint import publish_toy_upsampler

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
QUICK: dict[str, Any] = {"seed": 7, "steps": 2, "guidance": 1.0, "model": "large"}
WIDTH, HEIGHT = 32, 24


@pytest.fixture(scope="module")
def large(placed: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with one more model, `large`: `placed`, enlarged from 16x16 to 32x24."""
    folder = shutil.copytree(placed.storage, tmp_path_factory.mktemp("large") / "storage")
    publish_toy_upsampler(folder, "large", read_info(Path(folder) / "placed.safetensors"))
    return placed.model_copy(update={"storage": folder})


@pytest.fixture
def client(large: Settings, connection: Redis) -> Iterator[httpx.Client]:
    with serving(large) as client:
        yield client


@pytest.fixture(autouse=True)
def worker(large: Settings, connection: Redis, alive: JobStore) -> Iterator[Runner]:
    with running(connection, large) as runner:
        yield runner


def generate(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    response = client.post("/generate", json={"labels": LISTS, **QUICK, **changes})
    assert response.status_code == 200, response.text
    job: dict[str, Any] = response.json()
    return job


def pictures_of(client: httpx.Client, job: dict[str, Any]) -> list[bytes]:
    return [client.get(one["url"]).raise_for_status().content for one in job["result"]["pictures"]]


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as picture:
        return picture.size


def test_pictures_and_grids_have_the_models_size(client: httpx.Client, large: Settings) -> None:
    shown = {model["name"]: model["picture"] for model in client.get("/models").json()["models"]}
    assert (shown["large"], shown["placed"]) == ([WIDTH, HEIGHT], [16, 16])
    assert client.get("/labels?model=large").json()["picture"] == [WIDTH, HEIGHT]
    job = generate(client, columns=2)
    denoiser = load_denoiser(Path(large.storage) / "large.safetensors")
    labels = torch.tensor([ICLEVR.multi_hot(one) for one in LISTS])
    options = SamplingOptions(steps=2, guidance=1.0)
    wanted = to_uint8(sample(denoiser.stepper(), labels, options, [picture_seed(7, i) for i in range(3)]))
    found = np.stack([read_png(png) for png in pictures_of(client, job)])
    assert found.shape == (3, HEIGHT, WIDTH, 3)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert np.array_equal(read_png(client.get(job["result"]["grid_url"]).content), sheet(found, 2))


def test_recipes_repeat_pictures_grid_and_strips(client: httpx.Client) -> None:
    job = generate(client, trajectory=3, columns=2)
    grid, first = client.get(job["result"]["grid_url"]).content, image(client, job)
    strip = client.get(job["result"]["pictures"][0]["trajectory_url"]).content
    assert recipe_in(grid)["labels"] == LISTS
    assert size_of(strip) == (2 + 3 * (21 + 2), 2 + 16 + 2)  # the 16x16 that is sampled, stretched to 4:3
    for content, path in ((grid, "grid.png"), (first, "images/0.png"), (strip, "trajectories/0.png")):
        again = client.post("/generate/png", files={"file": content}).json()
        assert client.get(f"/jobs/{again['id']}/{path}").content == content


def test_they_are_scored_as_sampled_and_as_uploaded(client: httpx.Client) -> None:
    fields = {name: json.dumps(value) for name, value in QUICK.items() if name != "model"} | {"model": "large"}
    file = ("test.json", json.dumps(LISTS))
    sampled = client.post("/score", files={"file": file}, data={**fields, "repeats": "1"}).json()
    pngs = pictures_of(client, sampled)
    assert pngs == pictures_of(client, generate(client))
    files = {"file": file, "pictures": ("z.zip", zipped({f"{i}.png": png for i, png in enumerate(pngs)}))}
    uploaded = client.post("/score", files=files, data={"columns": "2"}).json()
    assert uploaded["result"]["accuracy"] == sampled["result"]["accuracy"]
    marks = [one["exact"] for one in uploaded["result"]["pictures"]]
    grid = read_png(client.get(uploaded["result"]["grid_url"]).content)
    assert np.array_equal(grid, marked_grid(np.stack([read_png(png) for png in pngs]), marks, 2))


def test_verdicts_say_how_far_objects_are_from_their_places(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corner(self: Evaluator, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, HEIGHT, WIDTH)
        return torch.zeros(len(images), len(ICLEVR), 2)

    layouts: Any = [[{"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 0.375}], None, [{"x": 0.5, "y": 0.5}]]
    assert [one["distances"] for one in generate(client, layouts=layouts)["result"]["pictures"]] == [None] * 3
    monkeypatch.setattr(Evaluator, "positions", corner)
    job = generate(client, layouts=layouts)
    assert {away is None for one in job["result"]["pictures"] for away in one["distances"] or ()} == {True, False}
    for layout, one in zip(layouts, job["result"]["pictures"], strict=True):
        wanted = layout and [
            math.hypot(point["x"], point["y"] * HEIGHT / WIDTH) if one["scores"][label] > 0.5 else None
            for label, point in zip(one["labels"], layout, strict=True)
        ]
        assert one["distances"] == pytest.approx(wanted, abs=1e-6)
        recipe = recipe_in(client.get(one["url"]).content)["verdicts"][0]
        assert recipe.get("distances") == pytest.approx(wanted, abs=0.006)
    assert client.post("/generate/png", files={"file": image(client, job)}).status_code == 200
    with Client(str(client.base_url)) as caller:
        places = [entry and [Point(**point) for point in entry] for entry in layouts]
        result = caller.generate(LISTS, layouts=places, seed=7, steps=2, guidance=1.0, model="large").result
    assert result is not None
    assert [one.distances for one in result.pictures] == [one["distances"] for one in job["result"]["pictures"]]
