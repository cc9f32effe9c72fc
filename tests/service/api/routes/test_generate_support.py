"""A number of objects or a layout that the model has not learnt is refused, wherever pictures are asked for."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from redis import Redis

from service.client import ApiError, Client
from service.contract.recipe import example
from service.settings import Settings
from service.store.jobs import JobStore
from shared.checkpoint import CheckpointInfo
from shared.options import LIMITS
from shared.vocabulary import ICLEVR
from tests.conftest import serving
from tests.service.api.answers import Body, nothing_is_queued, problem
from tests.service.api.uploads.zips import png, zipped
from tests.toy_checkpoint import publish_toy_denoiser

SUPPORT = {"objects": [2, 3], "area": [[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]], "nearest": 0.25}
ONE, TWO, FOUR = list(ICLEVR.names[:1]), list(ICLEVR.names[:2]), list(ICLEVR.names[:4])
TOO_MANY = "4 labels; this model has learnt pictures of 2 to 3 objects"
TOO_FEW = "1 labels; this model has learnt pictures of 2 to 3 objects"
QUEUED = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def folder(storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(storage, tmp_path_factory.mktemp("few") / "storage")


@pytest.fixture(scope="module")
def few(folder: Path) -> CheckpointInfo:
    """A model that has learnt pictures of two and three objects, in a square in the middle."""
    return publish_toy_denoiser(folder, "few", 4, positions=True, support=SUPPORT)


@pytest.fixture
def client(settings: Settings, folder: Path, few: CheckpointInfo, alive: JobStore) -> Iterator[httpx.Client]:
    with serving(settings.model_copy(update={"storage": folder})) as client:
        yield client


def recipe(info: CheckpointInfo, **changes: Any) -> Body:
    return {"recipe": {**example(), "model": {"name": "x", "digest": info.digest}, **changes}}


def layouts_of(*points: tuple[float, float]) -> Any:
    return [None, [{"x": x, "y": y} for x, y in points]]


LAYOUTS = [
    (layouts_of((0.5, 0.5), (0.2, 0.5)), "[0.2, 0.5] is outside the area in which this model has seen objects"),
    (layouts_of((0.5, 0.5), (0.6, 0.5)), "[0.5, 0.5] and [0.6, 0.5] are 0.100 apart; this model has seen no two"),
]


def refused(response: httpx.Response, loc: list[str | int], entry: int, message: str) -> None:
    body = problem(response, 422, "not-learnt")
    assert body["errors"][0]["loc"] == ["body", *loc]
    assert body["detail"].startswith(f"{'.'.join(map(str, loc))}: {message}")
    assert (body["entry"], body["model"], body["support"]) == (entry, "few", SUPPORT)


@pytest.mark.parametrize(("labels", "message"), [(ONE, TOO_FEW), (FOUR, TOO_MANY)])
def test_a_number_of_objects_outside_the_range(
    client: httpx.Client, few: CheckpointInfo, connection: Redis, labels: list[str], message: str
) -> None:
    lists, form = [TWO, labels], {"model": "few"}
    file = {"file": str(lists).replace("'", '"').encode()}
    for response, loc in (
        (client.post("/generate", json={"labels": lists, "model": "few"}), ["labels", 1]),
        (client.post("/generate", json=recipe(few, labels=lists)), ["recipe", "labels", 1]),
        (client.post("/score/conditions", json={"conditions": lists, "model": "few"}), ["conditions", 1]),
        (client.post("/score", files=file, data=form), ["file", 1]),
    ):
        refused(response, list(loc), 1, message)
    assert nothing_is_queued(connection)


@pytest.mark.parametrize(("layouts", "message"), LAYOUTS)
def test_a_layout_outside_the_range(
    client: httpx.Client, few: CheckpointInfo, connection: Redis, layouts: Any, message: str
) -> None:
    asked = {"labels": [TWO, TWO], "layouts": layouts}
    refused(client.post("/generate", json={**asked, "model": "few"}), ["layouts", 1], 1, message)
    refused(client.post("/generate", json=recipe(few, **asked)), ["recipe", "layouts", 1], 1, message)
    assert nothing_is_queued(connection)


def test_openais_clients_get_it_in_their_form(client: httpx.Client, connection: Redis) -> None:
    ai = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    with ai, pytest.raises(openai.BadRequestError, match=f"prompt: {TOO_MANY}") as caught:
        ai.images.generate(prompt=" and ".join(FOUR), model="few", n=2)
    assert (caught.value.code, caught.value.param) == ("not_learnt", "prompt")
    assert nothing_is_queued(connection)


def test_what_is_in_the_range_is_accepted(client: httpx.Client) -> None:
    within = {"labels": [TWO, FOUR[:3]], "layouts": [[{"x": 0.24, "y": 0.5}, {"x": 0.49, "y": 0.5}], None]}
    assert client.post("/generate", json={**within, "model": "few"}, headers=QUEUED).status_code == 202
    most = list(ICLEVR.names[: LIMITS.max_labels])  # `toy` does not say what it has learnt
    assert client.post("/generate", json={"labels": [most]}, headers=QUEUED).status_code == 202


def test_uploaded_pictures_may_show_any_number_of_objects(client: httpx.Client, folder: Path) -> None:
    file = {"file": str([ONE, FOUR]).replace("'", '"').encode()}
    files: Any = {**file, "pictures": zipped({"0.png": png(0), "1.png": png(1)})}
    assert client.post("/score", files=files, headers=QUEUED).status_code == 202


def test_models_and_labels_say_what_they_have_learnt(client: httpx.Client) -> None:
    unlimited = {"objects": [1, LIMITS.max_labels], "area": None, "nearest": None}
    shown = {model["name"]: model["support"] for model in client.get("/models").json()["models"]}
    assert (shown["few"], shown["toy"]) == (SUPPORT, unlimited)
    assert client.get("/labels?model=few").json()["support"] == SUPPORT
    assert client.get("/labels").json()["support"] == unlimited
    with Client(str(client.base_url)) as caller:
        found = {model.name: model for model in caller.models().models}["few"]
        assert found.support is not None
        assert found.support == caller.labels("few").support
        assert (found.support.objects, found.support.nearest) == ((2, 3), 0.25)
        assert (found.picture, caller.labels("few").picture) == ((16, 16), (16, 16))
        with pytest.raises(ApiError, match=TOO_MANY) as caught:
            caller.generate([FOUR], model="few")
    assert (caught.value.status, caught.value.slug, caught.value.problem["support"]) == (422, "not-learnt", SUPPORT)


def test_no_more_steps_are_taken_than_the_model_has_timesteps(
    client: httpx.Client, folder: Path, alive: JobStore
) -> None:
    publish_toy_denoiser(folder, "short", 6, timesteps=50)
    asked = {"model": "short", "labels": [ONE]}
    body = problem(client.post("/generate", json={**asked, "steps": 51}), 422, "invalid-request")
    assert body["detail"] == "steps: 51 steps; the model short takes 50 at most"
    assert nothing_is_queued(alive.connection)
    assert client.post("/generate", json={**asked, "steps": 50}, headers=QUEUED).status_code == 202
