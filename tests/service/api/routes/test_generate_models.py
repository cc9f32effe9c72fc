"""What models differ in: whether they take layouts, what they have learnt, and the size of their pictures."""

import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from redis import Redis
from torch import Tensor

from iclevr.labels import ICLEVR
from service.client import Client
from service.contract.options import PictureOptions
from service.contract.recipe import example
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.diffusion.denoise import sample
from shared.diffusion.layouts import positions_at
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator
from shared.options import LIMITS, SamplingOptions, picture_seed
from shared.pictures import marked_grid, read_png, sheet, to_uint8
from tests.conftest import running, serving
from tests.service.api.answers import Body, image, nothing_is_queued, problem, recipe_in
from tests.service.api.uploads.zips import png, zipped
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
PLACES: list[Any] = [[{"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 0.375}], None, [{"x": 0.5, "y": 0.5}]]
QUICK = PictureOptions(steps=2, guidance=1.0)
BODY: dict[str, Any] = {"labels": LISTS, "seed": 7, "steps": 2, "guidance": 1.0, "model": "placed"}
WIDTH, HEIGHT = 32, 24
SUPPORT = {"objects": [2, 3], "area": [[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]], "nearest": 0.25}
ONE, TWO, FOUR = list(ICLEVR.names[:1]), list(ICLEVR.names[:2]), list(ICLEVR.names[:4])
TOO_MANY = "4 labels; this model has learnt pictures of 2 to 3 objects"
QUEUED = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def models(placed: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with two more models: `large` is `placed`, enlarged from 16x16 to 32x24; `few` has learnt pictures of
    two and three objects, in a square in the middle.
    """
    folder = Path(shutil.copytree(placed.storage, tmp_path_factory.mktemp("models") / "storage"))
    publish_toy_upsampler(folder, "large", read_info(folder / "placed.safetensors"))
    publish_toy_denoiser(folder, "few", 4, positions=True, support=SUPPORT)
    return placed.model_copy(update={"storage": folder})


@pytest.fixture
def client(models: Settings, alive: JobStore) -> Iterator[httpx.Client]:
    with serving(models) as client:
        yield client


@pytest.fixture
def worker(models: Settings, connection: Redis, alive: JobStore) -> Iterator[Runner]:
    with running(connection, models) as runner:
        yield runner


def generate(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    response = client.post("/generate", json={**BODY, **changes})
    assert response.status_code == 200, response.text
    job: dict[str, Any] = response.json()
    return job


def pictures_of(client: httpx.Client, job: dict[str, Any]) -> list[bytes]:
    return [client.get(one["url"]).raise_for_status().content for one in job["result"]["pictures"]]


def test_the_network_gets_the_requested_layout(client: httpx.Client, worker: Runner, models: Settings) -> None:
    plain, with_layout = generate(client), generate(client, layouts=PLACES)
    assert (plain["layouts"], with_layout["layouts"]) == (None, PLACES)
    assert image(client, plain, 1) == image(client, with_layout, 1)  # its layout is null

    stepper = load_denoiser(models.storage / "placed.safetensors").stepper()
    points = [(point["x"], point["y"]) for point in PLACES[0]]
    positions = positions_at(ICLEVR.encode(LISTS[0]), points, len(ICLEVR))
    row = stepper.new_row(ICLEVR.multi_hot(LISTS[0]), QUICK, picture_seed(7, 0), positions)
    while not row.done:
        stepper.step([row])
    without = sample(stepper, torch.tensor([ICLEVR.multi_hot(LISTS[0])]), QUICK, [picture_seed(7, 0)])[0]
    for job, wanted in ((with_layout, row.x), (plain, without)):
        assert np.array_equal(read_png(image(client, job, 0)), to_uint8(wanted[None])[0])
    assert not np.array_equal(to_uint8(without[None]), to_uint8(row.x[None]))


@pytest.mark.parametrize("model", ["placed", "large"])
def test_recipes_keep_layouts_and_repeat_pictures_grid_and_strips(
    client: httpx.Client, worker: Runner, model: str
) -> None:
    job = generate(client, model=model, layouts=PLACES, trajectory=3, columns=2)
    grid, (first, second, _) = client.get(job["result"]["grid_url"]).content, pictures_of(client, job)
    strip = client.get(job["result"]["pictures"][0]["trajectory_url"]).content
    assert (recipe_in(grid)["labels"], recipe_in(grid)["layouts"]) == (LISTS, PLACES)
    assert recipe_in(first)["layouts"] == PLACES[:1]
    assert "layouts" not in recipe_in(second)
    side = 16 if model == "placed" else 21  # the 16x16 that is sampled, stretched to 4:3
    assert Image.open(io.BytesIO(strip)).size == (2 + 3 * (side + 2), 2 + 16 + 2)
    for content, path in (
        (grid, "grid.png"),
        (first, "images/0.png"),
        (second, "images/0.png"),
        (strip, "trajectories/0.png"),
    ):
        again = client.post("/generate/png", files={"file": content}).json()
        assert client.get(f"/jobs/{again['id']}/{path}").content == content


@pytest.mark.parametrize(
    ("layouts", "where", "message"),
    [
        (PLACES[:1], ["layouts"], "1 layouts; wanted 3, one for each label list, or null"),
        ([PLACES[0], PLACES[0], None], ["layouts", 1], "layouts.1: 2 points; wanted 1, one for each label"),
        ([[{"x": 1.01, "y": 0.5}] * 2, None, None], ["layouts", 0, 0, "x"], "less than or equal to 1"),
        ([None, [{"x": 0.5, "y": 0.5, "z": 0.5}], None], ["layouts", 1, 0, "z"], "unknown; known are x, y"),
        ([None, [[0.5, 0.5]], None], ["layouts", 1, 0], "should be an object"),
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
    assert known == {"few": True, "large": True, "other": False, "placed": True, "toy": False}
    body = {**BODY, "layouts": [None, [{"x": 0.5, "y": 0.5}], None], "model": "toy"}
    found = problem(client.post("/generate", json=body), 422, "invalid-request")
    assert found["detail"] == "layouts.1: the model toy takes no layouts; GET /models lists those with `positions`"
    assert found["entry"] == 1
    response = client.post("/generate", json={**body, "layouts": [None] * 3}, headers={"prefer": "respond-async"})
    assert response.status_code == 202
    assert response.json()["layouts"] is None


def recipe(models: Settings, **changes: Any) -> Body:
    digest = read_info(models.storage / "few.safetensors").digest
    return {"recipe": {**example(), "model": {"name": "x", "digest": digest}, **changes}}


def refused(response: httpx.Response, loc: list[str | int], entry: int, message: str) -> None:
    body = problem(response, 422, "not-learnt")
    assert body["errors"][0]["loc"] == ["body", *loc]
    assert body["detail"].startswith(f"{'.'.join(map(str, loc))}: {message}")
    assert (body["entry"], body["model"], body["support"]) == (entry, "few", SUPPORT)


def test_a_number_of_objects_outside_the_range(client: httpx.Client, models: Settings, connection: Redis) -> None:
    lists, form = [TWO, FOUR], {"model": "few"}
    file = {"file": json.dumps(lists)}
    for response, loc in (
        (client.post("/generate", json={"labels": lists, "model": "few"}), ["labels", 1]),
        (client.post("/generate", json=recipe(models, labels=lists)), ["recipe", "labels", 1]),
        (client.post("/score", files=file, data=form), ["file", 1]),
    ):
        refused(response, list(loc), 1, TOO_MANY)
    assert nothing_is_queued(connection)


def test_a_layout_outside_the_range(client: httpx.Client, models: Settings, connection: Redis) -> None:
    asked = {"labels": [TWO, TWO], "layouts": [None, [{"x": 0.5, "y": 0.5}, {"x": 0.2, "y": 0.5}]]}
    message = "[0.2, 0.5] is outside the area in which this model has seen objects"
    refused(client.post("/generate", json={**asked, "model": "few"}), ["layouts", 1], 1, message)
    refused(client.post("/generate", json=recipe(models, **asked)), ["recipe", "layouts", 1], 1, message)
    assert nothing_is_queued(connection)


def test_openais_clients_get_it_in_their_form(client: httpx.Client, connection: Redis) -> None:
    ai = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    with ai, pytest.raises(openai.BadRequestError, match=f"prompt: {TOO_MANY}") as caught:
        ai.images.generate(prompt=" and ".join(FOUR), model="few", n=2)
    assert (caught.value.code, caught.value.param) == ("not_learnt", "prompt")
    assert nothing_is_queued(connection)


def test_what_is_in_the_range_is_accepted_and_uploaded_pictures_are_not_checked(client: httpx.Client) -> None:
    within = {"labels": [TWO, FOUR[:3]], "layouts": [[{"x": 0.24, "y": 0.5}, {"x": 0.49, "y": 0.5}], None]}
    assert client.post("/generate", json={**within, "model": "few"}, headers=QUEUED).status_code == 202
    most = list(ICLEVR.names[: LIMITS.max_labels])  # `toy` does not say what it has learnt
    assert client.post("/generate", json={"labels": [most]}, headers=QUEUED).status_code == 202
    files = {"file": json.dumps([ONE, FOUR]).encode(), "pictures": zipped({"0.png": png(0), "1.png": png(1)})}
    assert client.post("/score", files=files, headers=QUEUED).status_code == 202


def test_models_and_labels_say_what_they_have_learnt(client: httpx.Client) -> None:
    unlimited = {"objects": [1, LIMITS.max_labels], "area": None, "nearest": None}
    shown = {one["name"]: (one["support"], one["picture"]) for one in client.get("/models").json()["models"]}
    assert (shown["few"], shown["toy"]) == ((SUPPORT, [16, 16]), (unlimited, [16, 16]))
    assert shown["large"][1] == client.get("/labels?model=large").json()["picture"] == [WIDTH, HEIGHT]
    assert client.get("/labels?model=few").json()["support"] == SUPPORT
    with Client(str(client.base_url)) as caller:
        found = {model.name: model for model in caller.models().models}["few"]
        assert found.support is not None
        assert found.support == caller.labels("few").support
        assert (found.support.objects, found.picture) == ((2, 3), (16, 16))


def test_no_more_steps_are_taken_than_the_model_has_timesteps(
    client: httpx.Client, models: Settings, alive: JobStore
) -> None:
    publish_toy_denoiser(models.storage, "short", 6, timesteps=50)
    asked = {"model": "short", "labels": [ONE]}
    body = problem(client.post("/generate", json={**asked, "steps": 51}), 422, "invalid-request")
    assert body["detail"] == "steps: 51 steps; the model short takes 50 at most; few takes 51"
    assert nothing_is_queued(alive.connection)
    assert client.post("/generate", json={**asked, "steps": 50}, headers=QUEUED).status_code == 202
    (models.storage / "short.safetensors").unlink()


def test_a_model_of_one_call_takes_one_step_without_guidance(
    client: httpx.Client, models: Settings, worker: Runner
) -> None:
    one = SamplingOptions(sampler="ddim", steps=1, guidance=1.0).model_dump(mode="json")
    base = publish_toy_denoiser(models.storage, "turned", 6, positions=True, rotations=True)
    publish_toy_upsampler(models.storage, "once", base, features=8, sampling=one)
    asked = {"model": "once", "labels": [ONE]}
    for changes, detail in (
        ({"steps": 8}, "steps: 8 steps; the model once takes 1 at most; few takes 8"),
        ({"guidance": 2.5}, "guidance: 2.5; the model once draws in one call, without guidance: 1; few takes 2.5"),
    ):
        assert problem(client.post("/generate", json={**asked, **changes}), 422, "invalid-request")["detail"] == detail
    body = problem(client.post("/generate", json={**asked, "trajectory": 3}), 422, "invalid-request")
    stages = "trajectory: 3 stages; 1 step has 2, noise and picture included"
    assert body["detail"] == stages
    job = client.post("/generate", json={**asked, "trajectory": 2}).json()
    assert (job["options"]["steps"], job["options"]["guidance"]) == (1, 1.0)
    (found,) = pictures_of(client, job)
    assert read_png(found).shape == (HEIGHT, WIDTH, 3)
    for name in ("once", "turned"):
        (models.storage / f"{name}.safetensors").unlink()


def test_pictures_and_grids_have_the_models_size(client: httpx.Client, worker: Runner, models: Settings) -> None:
    job = generate(client, model="large", columns=2)
    denoiser = load_denoiser(models.storage / "large.safetensors")
    labels = torch.tensor([ICLEVR.multi_hot(one) for one in LISTS])
    wanted = to_uint8(sample(denoiser.stepper(), labels, QUICK, [picture_seed(7, i) for i in range(3)]))
    found = np.stack([read_png(png) for png in pictures_of(client, job)])
    assert found.shape == (3, HEIGHT, WIDTH, 3)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert np.array_equal(read_png(client.get(job["result"]["grid_url"]).content), sheet(found, 2))


def test_they_are_scored_as_sampled_and_as_uploaded(client: httpx.Client, worker: Runner) -> None:
    fields = {"seed": "7", "steps": "2", "guidance": "1.0", "model": "large", "repeats": "1"}
    file = ("test.json", json.dumps(LISTS))
    sampled = client.post("/score", files={"file": file}, data=fields).json()
    pngs = pictures_of(client, sampled)
    assert pngs == pictures_of(client, generate(client, model="large"))
    files = {"file": file, "pictures": ("z.zip", zipped({f"{i}.png": one for i, one in enumerate(pngs)}))}
    uploaded = client.post("/score", files=files, data={"columns": "2"}).json()
    assert uploaded["result"]["accuracy"] == sampled["result"]["accuracy"]
    marks = [one["exact"] for one in uploaded["result"]["pictures"]]
    grid = read_png(client.get(uploaded["result"]["grid_url"]).content)
    assert np.array_equal(grid, marked_grid(np.stack([read_png(one) for one in pngs]), marks, 2))


def test_verdicts_say_how_far_objects_are_from_their_places(
    client: httpx.Client, worker: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corner(self: Evaluator, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, HEIGHT, WIDTH)
        return torch.zeros(len(images), len(ICLEVR), 2)

    asked = {"model": "large", "layouts": PLACES}
    assert [one["distances"] for one in generate(client, **asked)["result"]["pictures"]] == [None] * 3
    monkeypatch.setattr(Evaluator, "positions", corner)
    job = generate(client, **asked)
    assert {away is None for one in job["result"]["pictures"] for away in one["distances"] or ()} == {True, False}
    for layout, one in zip(PLACES, job["result"]["pictures"], strict=True):
        wanted = layout and [
            math.hypot(point["x"], point["y"] * HEIGHT / WIDTH) if one["scores"][label] > 0.5 else None
            for label, point in zip(one["labels"], layout, strict=True)
        ]
        assert one["distances"] == pytest.approx(wanted, abs=1e-6)
        recipe = recipe_in(client.get(one["url"]).content)["verdicts"][0]
        two_digits = wanted and [away and round(away, 2) for away in wanted]  # the same bytes whatever the batch
        assert recipe.get("distances") == two_digits
    assert client.post("/generate/png", files={"file": image(client, job)}).status_code == 200
