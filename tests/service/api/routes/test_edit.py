"""Editing pictures by label: what stays, what is refused, and recipes that hold the chain."""

import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from redis import Redis

from iclevr.labels import ICLEVR
from service.contract.options import PictureOptions
from service.settings import Settings
from service.store import keys
from service.store.jobs import UNREADABLE, JobStore
from service.worker.runner import Runner
from shared.diffusion.edits import with_objects
from shared.diffusion.model import load_denoiser
from shared.edits import edited
from shared.options import picture_seed
from shared.pictures import read_png, to_uint8
from tests.conftest import running, serving
from tests.service.api.answers import Body, image, problem, recipe_in, scoring
from tests.service.api.uploads.zips import png, zipped
from tests.toy_checkpoint import publish_toy_denoiser

LABELS = ["red cube", "blue sphere"]
BODY: Body = {"labels": [["gray cylinder"], LABELS], "seed": 7, "steps": 3, "model": "placed", "sampler": "ddpm"}
ADD: Body = {"add": {"label": "green cube", "x": 0.25, "y": 0.75}}
RECOLOUR: Body = {"recolour": {"label": "red cube", "to": "cyan cube"}}
MOVE: Body = {"move": {"label": "blue sphere", "x": 0.625, "y": 0.5}}
REMOVE: Body = {"remove": {"label": "red cube"}}
SUPPORT = {"objects": [2, 3], "area": [[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]], "nearest": 0.25}
QUEUED = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def models(placed: Settings) -> Settings:
    publish_toy_denoiser(placed.storage, "narrow", 5, positions=True, support=SUPPORT)
    return placed


@pytest.fixture
def client(models: Settings, alive: JobStore) -> Iterator[httpx.Client]:
    with serving(models) as client:
        yield client


@pytest.fixture
def worker(models: Settings, connection: Redis, alive: JobStore) -> Iterator[Runner]:
    with running(connection, models) as runner:
        yield runner


def post(client: httpx.Client, path: str, body: Body) -> Body:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    job: Body = response.json()
    return job


def edit(client: httpx.Client, job: Body, index: int, *edits: Body) -> Body:
    return post(client, f"/jobs/{job['id']}/images/{index}/edit", {"edits": edits})


def test_an_edit_changes_what_the_network_is_given_of_the_named_objects_only(
    client: httpx.Client, worker: Runner, models: Settings
) -> None:
    job = post(client, "/generate", BODY)
    new = edit(client, job, 1, ADD, RECOLOUR)
    (picture,) = new["result"]["pictures"]
    assert (new["labels"], new["options"]["edits"]) == ([LABELS], [ADD, RECOLOUR])
    assert picture["labels"] == ["cyan cube", "blue sphere", "green cube"]
    before = job["result"]["pictures"][1]
    assert picture["places"][:2] == before["places"]
    assert picture["places"][2] == {"x": 0.25, "y": 0.75}
    assert picture["seed"] == before["seed"]

    options = PictureOptions(steps=3, sampler="ddpm")
    stepper = load_denoiser(models.storage / "placed.safetensors").stepper()
    row = stepper.new_row(ICLEVR.multi_hot(LABELS), options, picture_seed(7, 1))
    edits = PictureOptions.model_validate({"edits": [ADD, RECOLOUR]}).edits
    row.labels = with_objects(row.labels, edited(LABELS, edits), ICLEVR)
    while not row.done:
        stepper.step([row])
    assert np.array_equal(read_png(image(client, new, 0)), to_uint8(row.x[None])[0])
    plain = stepper.new_row(ICLEVR.multi_hot(picture["labels"]), options, picture_seed(7, 1))
    assert not torch.equal(plain.labels, row.labels)


def test_a_chain_is_one_recipe_however_it_is_sent(client: httpx.Client, worker: Runner) -> None:
    first = post(client, "/generate", BODY)
    second = edit(client, first, 1, ADD)
    third = edit(client, second, 0, MOVE, REMOVE)
    png = image(client, third, 0)
    recipe = recipe_in(png)
    assert (recipe["labels"], recipe["options"]["edits"]) == ([LABELS], [ADD, MOVE, REMOVE])

    again = client.post("/generate/png", files={"file": png}).json()
    assert image(client, again, 0) == png
    at_once = post(client, "/generate", {"recipe": recipe_in(image(client, first, 1)), "edits": [ADD, MOVE, REMOVE]})
    assert image(client, at_once, 0) == png
    fields = {"edits": [json.dumps(one) for one in (MOVE, REMOVE)]}
    by_png = client.post("/generate/png", files={"file": image(client, second, 0)}, data=fields).json()
    assert image(client, by_png, 0) == png
    of_labels = post(client, "/generate", {**BODY, "labels": [LABELS], "edits": [ADD]})
    assert len(of_labels["result"]["pictures"][0]["labels"]) == 3
    assert edit(client, third, 0, {"recolour": {"label": "blue sphere", "to": "red cube"}})["result"]


def test_edits_of_places_that_were_asked_for(client: httpx.Client, worker: Runner) -> None:
    layouts = [[{"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 0.375}]]
    job = post(client, "/generate", {**BODY, "labels": [LABELS], "layouts": layouts})
    same = edit(client, job, 0, {"move": {"label": "red cube", "x": 0.25, "y": 0.5}})
    assert np.array_equal(read_png(image(client, same, 0)), read_png(image(client, job, 0)))
    moved = edit(client, job, 0, MOVE)
    assert moved["layouts"] == layouts
    assert moved["result"]["pictures"][0]["places"] == [layouts[0][0], {"x": 0.625, "y": 0.5}]


@pytest.mark.parametrize(
    ("edits", "slug", "detail"),
    [
        ([REMOVE, MOVE, REMOVE], "no-such-object", 'edits.2: no object is "red cube": there are blue sphere'),
        ([{"add": {**ADD["add"], "label": "red cube"}}], "invalid-request", 'there already is "red cube"'),
        ([{"add": {**ADD["add"], "label": "green cub"}}], "invalid-request", 'did you mean "green cube"'),
        ([REMOVE], "not-learnt", "1 labels; this model has learnt pictures of 2 to 3 objects"),
        ([{"move": {"label": "red cube", "x": 0.9, "y": 0.5}}], "not-learnt", "is outside the area"),
        ([{"move": {"label": "red cube", "x": 0.5, "y": 0.5}}], "not-learnt", "no two objects nearer than"),
        ([{"add": {"label": "green cube", "x": 0.5, "y": 0.5}}, {"remove": {"label": "blue sphere"}}], None, ""),
        ([], "invalid-request", "at least 1 item"),
        ([REMOVE, {"paint": {}}], "invalid-request", "edits.1.paint: unknown"),
        ([MOVE] * 65, "invalid-request", "at most 64 items"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_picture_is_refused(
    client: httpx.Client, worker: Runner, edits: list[Body], slug: str | None, detail: str
) -> None:
    layouts = [[{"x": 0.25, "y": 0.25}, {"x": 0.5, "y": 0.5}]]
    job = post(client, "/generate", {**BODY, "model": "narrow", "labels": [LABELS], "layouts": layouts})
    response = client.post(f"/jobs/{job['id']}/images/0/edit", json={"edits": edits})
    if slug is None:
        assert response.status_code == 200
    else:
        assert detail in problem(response, 422, slug)["detail"]


def test_places_that_the_seed_drew_are_known_to_the_check(client: httpx.Client, worker: Runner) -> None:
    job = post(client, "/generate", {**BODY, "model": "narrow", "labels": [LABELS]})
    at = job["result"]["pictures"][0]["places"][1]
    onto = {"move": {"label": "red cube", **at}}
    response = client.post(f"/jobs/{job['id']}/images/0/edit", json={"edits": [onto]})
    assert problem(response, 422, "not-learnt")["entry"] == 0


def test_too_long_a_chain_is_refused(client: httpx.Client, worker: Runner) -> None:
    job = edit(client, post(client, "/generate", {**BODY, "labels": [LABELS]}), 0, *[MOVE] * 64)
    response = client.post(f"/jobs/{job['id']}/images/0/edit", json={"edits": [MOVE]})
    assert "1 edits after 64; a picture takes 64 at most" in problem(response, 422, "invalid-request")["detail"]


def test_models_without_positions_and_uploaded_pictures_take_no_edits(client: httpx.Client, worker: Runner) -> None:
    plain = post(client, "/generate", {**BODY, "model": "toy", "labels": [LABELS]})
    response = client.post(f"/jobs/{plain['id']}/images/0/edit", json={"edits": [ADD]})
    assert (
        "the model toy takes no edits, as it knows no positions" in problem(response, 422, "invalid-request")["detail"]
    )
    assert plain["result"]["pictures"][0]["places"] is None
    response = client.post("/generate", json={**BODY, "model": "toy", "edits": [ADD]})
    problem(response, 422, "invalid-request")
    missing = client.post(f"/jobs/{plain['id']}/images/1/edit", json={"edits": [ADD]})
    problem(missing, 404, "unknown-picture")
    sent = scoring([LABELS])
    sent["files"]["pictures"] = ("pictures.zip", zipped({"0.png": png()}))
    judged = client.post("/score", **sent).json()
    response = client.post(f"/jobs/{judged['id']}/images/0/edit", json={"edits": [ADD]})
    assert "a PNG without a recipe" in problem(response, 422, "invalid-request")["detail"]


def test_an_unfinished_picture_cannot_be_edited(client: httpx.Client) -> None:
    job = client.post("/generate", json=BODY, headers=QUEUED).json()
    problem(client.post(f"/jobs/{job['id']}/images/0/edit", json={"edits": [ADD]}), 409, "not-ready")


def test_a_worker_that_knows_no_edits_fails_the_job(
    client: httpx.Client, alive: JobStore, models: Settings, connection: Redis
) -> None:
    """To such a worker the options have an unknown field, as `glow` is to this one."""
    job = client.post("/generate", json={**BODY, "edits": [REMOVE], "labels": [LABELS]}, headers=QUEUED).json()
    raw = connection.hget(keys.job(job["id"]), "record")
    assert '"edits":' in raw.partition('"options":{')[2].partition("}]")[0]
    connection.hset(keys.job(job["id"]), "record", raw.replace('"edits":', '"glow":'))
    with running(connection, models):
        ended = client.get(f"/jobs/{job['id']}/events").text
    assert UNREADABLE in ended
