"""`labelgrid.load`: a model in this process gives what a service gives, and refuses what it refuses."""

import io
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from redis import Redis

import labelgrid
from labelgrid import Client, Point, load
from labelgrid.model import Model, Picture
from service.contract.recipe import KEYWORD, JudgedRecipe
from service.settings import Settings
from service.store.async_jobs import DIGITS
from service.store.jobs import JobStore
from shared.checkpoint import CheckpointError
from shared.device import DeviceError
from shared.options import picture_seed
from shared.pictures import to_uint8
from shared.registry import promote
from shared.vocabulary import Vocabulary
from tests.conftest import running, serving
from tests.paths import ROOT
from tests.test_architecture import heavy_modules_after, import_with_extra
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_evaluator

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
LAYOUTS = [[Point(x=0.25, y=0.75), Point(x=0.625, y=0.5)], None, [Point(x=0.5, y=0.5)]]
EDITS: list[dict[str, Any]] = [
    {"recolour": {"label": "red cube", "to": "cyan cube"}},
    {"move": {"label": "blue sphere", "x": 0.625, "y": 0.5}},
]
SUPPORT = {"objects": [2, 3], "area": [[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]], "nearest": 0.25}


@pytest.fixture(scope="module")
def settings_of_all(placed: Settings) -> Settings:
    publish_toy_denoiser(placed.storage, "narrow", 5, positions=True, support=SUPPORT)
    return placed


@pytest.fixture(scope="module")
def models(settings_of_all: Settings) -> dict[str, Model]:
    return {name: load(name, storage=settings_of_all.storage) for name in ("toy", "placed", "narrow")}


@pytest.fixture
def http(settings_of_all: Settings, alive: JobStore) -> Iterator[httpx.Client]:
    with serving(settings_of_all) as client:
        yield client


@pytest.fixture
def service(settings_of_all: Settings, http: httpx.Client, connection: Redis) -> Iterator[Client]:
    """A client of a service with a worker."""
    with running(connection, settings_of_all), Client(str(http.base_url)) as client:
        yield client


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("toy", {"seed": 7}),
        ("toy", {"seed": 8, "steps": 3, "guidance": 2.0, "sampler": "ddpm", "until": "exact", "attempts": 3}),
        ("placed", {"seed": 7, "steps": 2}),
        ("placed", {"seed": 7, "steps": 2, "layouts": LAYOUTS}),
    ],
)
def test_pictures_and_verdicts_are_the_services(
    models: dict[str, Model], service: Client, name: str, options: dict[str, Any]
) -> None:
    pictures = models[name](LISTS, **options)
    job = service.generate(LISTS, model=name, columns=2, **options)
    assert len(pictures) == len(LISTS)
    for i, picture in enumerate(pictures):
        assert picture.png == service.image(job.id, i)
        told = job.result.pictures[i].model_dump(exclude={"url", "trajectory_url", "kept", "attempts"})
        own = {**picture.verdict.shown(DIGITS), "labels": list(picture.labels), "seed": picture.seed}
        own["places"] = own["places"] and [point.model_dump() for point in own["places"]]
        assert own == told
        tried = job.result.pictures[i].attempts
        assert [one.seed for one in picture.verdict.attempts] == [one.seed for one in tried or ()]
        assert len(picture.verdict.attempts) == options.get("attempts", 0)
    assert pictures.grid(columns=2) == service.grid(job.id)


def test_an_edited_picture_is_the_services(models: dict[str, Model], service: Client) -> None:
    before = models["placed"].sample(LISTS, seed=7, steps=2)[0]
    job = service.generate(LISTS, model="placed", seed=7, steps=2)
    after, twice = models["placed"].edit(before, EDITS), service.edit(job.id, 0, EDITS)
    assert after.png == service.image(twice.id, 0) != before.png
    assert after.labels == ("cyan cube", "blue sphere")
    again, thrice = (
        models["placed"].edit(after, [{"remove": {"label": "cyan cube"}}]),
        service.edit(twice.id, 0, [{"remove": {"label": "cyan cube"}}]),
    )
    assert again.png == service.image(thrice.id, 0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("toy", {"labels": [["red cubes"]]}, 'entry 0: unknown label "red cubes"; did you mean "red cube"?'),
    ("toy", {"labels": [["gray cube"], ["red cube", "red cube"]]}, 'entry 1: duplicate label "red cube"'),
    ("toy", {"labels": ["red cube"]}, "labels.0: Input should be a valid list"),
    ("toy", {"labels": []}, "expected at least one label list, got an empty list"),
    ("toy", {"labels": [["red cube"]] * 257}, "257 label lists; at most 256 are allowed"),
    ("toy", {"labels": LISTS, "steps": 0}, "steps: Input should be greater than or equal to 1"),
    ("toy", {"labels": LISTS, "sampler": "plms"}, "sampler: Input should be 'ddpm'"),
    ("toy", {"labels": LISTS, "eta": 0.5}, "eta is 0.5 with sampler sde_dpmpp_2m; only ddim takes an eta other than 0"),
    ("toy", {"labels": LISTS, "attempts": 2}, "attempts has no effect without until; leave it out"),
    ("toy", {"labels": LISTS, "seed": -1}, "seed: Input should be greater than or equal to 0"),
    ("toy", {"labels": LISTS, "layouts": LAYOUTS}, "layouts.0: the model toy takes no layouts"),
    ("placed", {"labels": LISTS, "layouts": LAYOUTS[:1]}, "layouts: 1 layouts; wanted 3, one for each label list"),
    ("narrow", {"labels": [["red cube"]]}, "labels.0: 1 labels; this model has learnt pictures of 2 to 3 objects"),
    (
        "narrow",
        {"labels": LISTS[:1], "layouts": [[Point(x=0.1, y=0.5), Point(x=0.5, y=0.5)]]},
        "layouts.0: [0.1, 0.5] is outside the area in which this model has seen objects",
    ),
]


@pytest.mark.parametrize(("name", "request_", "sentence"), REFUSED, ids=[sentence[:40] for *_, sentence in REFUSED])
def test_what_the_service_refuses_is_refused_in_its_words(
    models: dict[str, Model], http: httpx.Client, name: str, request_: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as refusal:
        models[name](**request_)
    points = [layout and [point.model_dump() for point in layout] for layout in request_.get("layouts", ())]
    answer = http.post("/generate", json={**request_, **({"layouts": points} if points else {}), "model": name})
    assert answer.status_code == 422
    assert answer.json()["detail"] == str(refusal.value)


def test_edits_are_refused_in_the_services_words(models: dict[str, Model]) -> None:
    plain, placed = models["toy"](LISTS[:1], steps=1)[0], models["placed"](LISTS[:1], steps=1)[0]
    with pytest.raises(ValueError, match=r"^edits: the model toy takes no edits, as it knows no positions"):
        models["toy"].edit(plain, EDITS)
    with pytest.raises(ValueError, match=r'^edits.0: no object is "gray cube": there are red cube, blue sphere$'):
        models["placed"].edit(placed, [{"remove": {"label": "gray cube"}}])
    with pytest.raises(ValueError, match=r"^the picture is one of toy, not of placed$"):
        models["placed"].edit(plain, EDITS)


def test_a_seed_gives_the_same_pictures_and_none_gives_others(models: dict[str, Model]) -> None:
    model = models["toy"]
    one, same, other, another = (model(LISTS, seed=seed, steps=2) for seed in (7, 7, 8, None))
    assert torch.equal(one.tensors, same.tensors)
    assert not torch.equal(one.tensors, other.tensors)
    assert not torch.equal(model(LISTS, steps=2).tensors, another.tensors)
    assert [picture.seed for picture in one] == [picture_seed(7, i) for i in range(3)]
    assert torch.equal(model(LISTS[:1], seed=7, steps=2).tensors, one.tensors[:1])


def test_tensors_are_the_pictures_before_rounding(models: dict[str, Model]) -> None:
    pictures = models["toy"](LISTS, seed=7, steps=2)
    assert (pictures.tensors.shape, pictures.tensors.dtype) == ((3, 3, 16, 16), torch.float32)
    assert pictures.tensors.abs().max() <= 1
    assert np.array_equal(to_uint8(pictures.tensors), np.stack([np.asarray(one.image) for one in pictures]))
    assert len((pictures.tensors.unique() + 1).mul(127.5).frac().unique()) > 2  # not those of 8 bits
    pictures.tensors.requires_grad_().sum().backward()  # no inference tensors, which nothing could learn from


def test_a_picture_says_what_the_evaluator_found(models: dict[str, Model]) -> None:
    (picture,) = models["toy"]([["red cube"]], seed=7, steps=2)
    verdict = picture.verdict
    assert (picture.labels, picture.exact, picture.accuracy) == (("red cube",), verdict.exact, verdict.accuracy)
    assert tuple(picture.probabilities) == models["toy"].info.vocabulary
    assert picture.found == [label for label, p in verdict.probabilities.items() if p > 0.5]
    changed = verdict.model_copy(update={"probabilities": {"red cube": 0.75, "gray cube": 0.5, "cyan cube": 0.51}})
    other = Picture(picture.image, changed, picture.recipe)
    assert (other.found, repr(other)) == (
        ["red cube", "cyan cube"],
        "<Picture of red cube; found: red cube, cyan cube>",
    )


def test_files_have_the_recipe(models: dict[str, Model], tmp_path: Path) -> None:
    pictures = models["toy"](LISTS, seed=7, steps=2)
    pictures[1].save(tmp_path / "one.png")
    pictures[1].save(str(tmp_path / "one.bmp"))
    pictures.save(tmp_path / "grid.png", columns=2)
    one, bmp, grid = (opened(tmp_path / file) for file in ("one.png", "one.bmp", "grid.png"))
    assert one.tobytes() == bmp.tobytes() == pictures[1].image.tobytes()
    own, all_ = (JudgedRecipe.model_validate_json(file.info[KEYWORD]) for file in (one, grid))
    assert (own.seed, own.first, own.labels) == (7, 1, LISTS[1:2])
    assert (all_.seed, all_.labels, all_.columns, len(all_.verdicts)) == (7, LISTS, 2, 3)
    assert grid.size == (2 * 18 + 2, 2 * 18 + 2)
    assert pictures._repr_png_() == pictures.grid()
    with pytest.raises(ValueError, match=r"^columns is 0; a grid has 1 to 64$"):
        pictures.grid(columns=0)


def test_the_default_is_the_promoted_model_of_the_storage(
    storage: Path, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LABELGRID_STORAGE", str(storage))
    model = load()
    assert repr(model) == "<Model toy, judged by toy-evaluator>"
    assert torch.equal(model(LISTS, seed=7, steps=2).tensors, models["toy"](LISTS, seed=7, steps=2).tensors)
    with pytest.raises(CheckpointError, match=r"^toys: no such denoiser in the storage; available: other, toy$"):
        load("toys")
    with pytest.raises(CheckpointError, match="there is no folder"):
        load(storage=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be opened as storage"):
        load(storage="nowhere://models")
    with pytest.raises(DeviceError, match='unknown device "gpu"'):
        load(device="gpu")


def test_another_evaluator_may_judge_if_it_knows_the_labels(tmp_path: Path) -> None:
    names = Vocabulary(("red cube", "gray cube"))
    publish_toy_denoiser(tmp_path, "two", 1, vocabulary=names)
    publish_toy_evaluator(tmp_path, "first", names)
    publish_toy_evaluator(tmp_path, "second", names)
    publish_toy_evaluator(tmp_path, "stranger", Vocabulary(("red cube", "blue cube")))
    promote(tmp_path, "second")
    assert load("two", storage=tmp_path).evaluator.name == "second"
    model = load("two", storage=str(tmp_path), evaluator="first", engine="torch")
    (picture,) = model([["red cube"]], seed=1, steps=1)
    assert picture.recipe.evaluator is not None
    assert (picture.recipe.evaluator.name, picture.recipe.model.name) == ("first", "two")
    with pytest.raises(
        CheckpointError, match=r"^two: has labels that the evaluator stranger does not know: gray cube$"
    ):
        load("two", storage=tmp_path, evaluator="stranger")
    with pytest.raises(
        CheckpointError, match=r"^third: no such evaluator in the storage; available: first, second, str"
    ):
        load("two", storage=tmp_path, evaluator="third")
    with pytest.raises(CheckpointError, match=r"^two: is of kind denoiser, not evaluator"):
        load("two", storage=tmp_path, evaluator="two")


def test_it_needs_the_extra_torch_alone_and_imports_it_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heavy_modules_after("from labelgrid import load") == set()
    assert import_with_extra("torch", "labelgrid.model").stderr == ""
    monkeypatch.delitem(sys.modules, "labelgrid.model")
    monkeypatch.setitem(sys.modules, "torch", None)
    sentence = "labelgrid.load needs more packages: pip install 'labelgrid[torch]' (there is no torch)"
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(sentence)}$"):
        labelgrid.load("iclevr-64")


def test_the_example_draws_a_grid(
    storage: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LABELGRID_STORAGE", str(storage))
    monkeypatch.setattr("sys.argv", ["in_process.py", str(tmp_path / "grid.png"), "red cube, gray cube", "blue sphere"])
    runpy.run_path(str(ROOT / "examples/in_process.py"), run_name="__main__")
    recipe = JudgedRecipe.model_validate_json(opened(tmp_path / "grid.png").info[KEYWORD])
    assert (recipe.labels, recipe.model.name) == ([["red cube", "gray cube"], ["blue sphere"]], "toy")
    assert len(capsys.readouterr().out.splitlines()) == 2


BLOCKS = [
    (page, block)
    for page in ("README.md", "docs/client.md")
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    if "load(" in block
]


def test_both_pages_load_a_model() -> None:
    assert {page for page, _ in BLOCKS} == {"README.md", "docs/client.md"}


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_the_blocks_of_the_pages_run_with_the_weights_of_the_installation(
    page: str, block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LABELGRID_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page, "exec"), {})
    written = list(tmp_path.glob("*.png"))
    assert written
    assert all(KEYWORD in opened(png).info for png in written)
