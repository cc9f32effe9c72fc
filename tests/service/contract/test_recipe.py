"""Every PNG carries its recipe, and the recipe gives the same picture again: the same bytes, in fact."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from service.api.catalog import Models
from service.api.uploads.png import PngError, recipe_of
from service.contract.errors import UnknownCheckpoint
from service.contract.recipe import MAX_SCORES, MadeWith, Recipe, RecipeVerdict, example
from service.contract.records import MAX_SEED, MAX_STAGES, Point
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.options import LIMITS, SamplingOptions
from shared.pictures import png_bytes
from shared.registry import resolve
from tests.conftest import serving
from tests.paths import ROOT
from tests.service.api.answers import nothing_is_queued, problem
from tests.service.api.uploads.zips import two_headers
from tests.shared.test_options import fractions, sampling_options
from tests.shared.test_vocabulary import any_json

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
UNLIKE_DEFAULTS = {
    "sampler": "ddim",
    "steps": 4,
    "spacing": "trailing",
    "guidance": 2.5,
    "guidance_interval": [0.125, 0.75],
    "eta": 0.5,
    "clip_x0": True,
}


def recipe_in(png: bytes) -> dict[str, Any]:
    """As any other program would read it."""
    with Image.open(io.BytesIO(png)) as picture:
        content: dict[str, Any] = json.loads(picture.info["labelgrid"])
    return content


def png_with(text: str | None, size: tuple[int, int] = (4, 4)) -> bytes:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt("labelgrid", text)
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_a_picture_says_how_it_was_made(client: httpx.Client, working: Runner, settings: Settings) -> None:
    body = {"labels": LISTS, "seed": 7, "model": "other", "columns": 2, **UNLIKE_DEFAULTS}
    result = client.post("/generate", json=body).json()["result"]
    denoiser = read_info(resolve(settings.storage, "other", "denoiser"))
    evaluator = read_info(resolve(settings.storage, None, "evaluator"))
    for i, shown in enumerate(result["pictures"]):
        recipe = recipe_in(client.get(shown["url"]).content)
        assert recipe["version"] == 1
        assert recipe["labels"] == [LISTS[i]]
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
    assert (grid["labels"], grid["seed"], grid["first"], grid["columns"]) == (LISTS, 7, 0, 2)
    assert [one["exact"] for one in grid["verdicts"]] == [shown["exact"] for shown in result["pictures"]]


def image(client: httpx.Client, job: dict[str, Any], index: int = 0) -> bytes:
    return client.get(f"/jobs/{job['id']}/images/{index}.png").raise_for_status().content


def grid_of(client: httpx.Client, job: dict[str, Any]) -> bytes:
    return client.get(job["result"]["grid_url"]).raise_for_status().content


@pytest.mark.parametrize("options", [{"steps": 3}, UNLIKE_DEFAULTS])
def test_a_recipe_gives_the_same_picture(client: httpx.Client, working: Runner, options: dict[str, Any]) -> None:
    job = client.post("/generate", json={"labels": LISTS, "seed": 7, "model": "other", **options}).json()
    for i in range(3):
        original = image(client, job, i)
        by_upload = client.post("/generate", files={"file": ("picture.png", original)})
        assert by_upload.status_code == 200, by_upload.text
        assert image(client, by_upload.json()) == original
        by_json = client.post("/generate", json={"recipe": recipe_in(original)}).json()
        assert image(client, by_json) == original
        assert (by_json["model"], by_json["seed"], by_json["progress"]["total"]) == ("other", 7, 1)


def test_a_grids_recipe_gives_the_whole_grid(client: httpx.Client, working: Runner) -> None:
    job = client.post("/generate", json={"labels": LISTS, "seed": 7, "steps": 3, "columns": 2}).json()
    original = grid_of(client, job)
    again = client.post("/generate", files={"file": original}, headers={"accept": "image/png"})
    assert again.headers["content-type"] == "image/png"
    assert again.content == original


@pytest.mark.parametrize("path", ["/generate", "/score"])
def test_the_grid_of_one_picture_is_that_picture(client: httpx.Client, working: Runner, path: str) -> None:
    lists = {"labels" if path == "/generate" else "conditions": LISTS[:1]}
    job = client.post(path, json={**lists, "seed": 7, "steps": 3, "columns": 2}).json()
    assert grid_of(client, job) == image(client, job)


def test_a_job_says_what_its_recipe_needs(client: httpx.Client, working: Runner) -> None:
    body = {"labels": LISTS, "seed": 7, "steps": 3, "columns": 2}
    whole = client.post("/generate", json=body).json()
    assert (whole["columns"], whole["trajectory"]) == (2, None)
    original = image(client, whole, 2)
    job = client.post("/generate", files={"file": original}).json()
    assert job["first"] == 2
    model = {"name": job["model"], "digest": job["digest"]}
    named = ("labels", "seed", "first", "options", "trajectory", "columns")
    recipe = {"version": 1, "model": model} | {name: job[name] for name in named}
    assert image(client, client.post("/generate", json={"recipe": recipe}).json(), 0) == original


def test_the_grid_of_a_scores_best_repeat_can_be_made_again(client: httpx.Client, working: Runner) -> None:
    job = client.post("/score", json={"conditions": LISTS, "repeats": 4, "seed": 5, "steps": 3}).json()
    original = grid_of(client, job)
    recipe = recipe_in(original)
    assert recipe["seed"] == 5 + job["result"]["best"]
    again = client.post("/generate", json={"recipe": recipe}).json()
    assert grid_of(client, again) == original
    last = image(client, job, 11)  # repeat 3, picture 2, whether it was the best or not
    assert (recipe_in(last)["seed"], recipe_in(last)["first"]) == (8, 2)
    assert image(client, client.post("/generate", files={"file": last}).json()) == last


def test_a_checkpoint_is_known_by_its_digest(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    recipe = example() | {"model": {"name": "toy", "digest": "0" * 64}}
    body = problem(client.post("/generate", json={"recipe": recipe}), 422, "unknown-checkpoint")
    assert "0" * 64 in body["detail"]
    assert body["models"] == {
        name: read_info(resolve(settings.storage, name, "denoiser")).digest for name in ("other", "toy")
    }
    body = problem(client.post("/generate", files={"file": png_with(json.dumps(recipe))}), 422, "unknown-checkpoint")
    assert nothing_is_queued(alive.connection)


def test_a_renamed_checkpoint_is_found(settings: Settings, tmp_path: Path) -> None:
    path = resolve(settings.storage, "other", "denoiser")
    digest = read_info(path).digest
    with pytest.raises(UnknownCheckpoint, match="available: none"):
        Models(tmp_path).with_digest(digest)
    shutil.copy(path, tmp_path / "renamed.safetensors")
    assert Models(tmp_path).with_digest(digest).name == "renamed"


def recipe_of_toy(settings: Settings, **changes: Any) -> dict[str, Any]:
    digest = read_info(resolve(settings.storage, "toy", "denoiser")).digest
    return example() | {"model": {"name": "toy", "digest": digest}} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "recipe.version"),
        ({"seed": -1}, "recipe.seed"),
        ({"seed": 2**53}, "recipe.seed"),
        ({"first": -1}, "recipe.first"),
        ({"options": {"steps": 0}}, "recipe.options.steps"),
        ({"options": {"eta": 0.5}}, "recipe.options"),
        ({"labels": [["red kube"]]}, 'did you mean "red cube"?'),
        ({"labels": []}, "at least one"),
        ({"first": 2**31, "labels": [["red cube"], ["gray cube"]]}, "last picture's position"),
        ({"labels": [["red cube"]] * 257}, "at most 256"),
        ({"model": {"name": "toy", "digest": "short"}}, "recipe.model.digest"),
        ({"pose": "standing"}, "recipe.pose"),
    ],
)
def test_recipes_that_cannot_be_made(
    client: httpx.Client, alive: JobStore, settings: Settings, changes: dict[str, Any], words: str
) -> None:
    recipe = recipe_of_toy(settings, **changes)
    assert words in problem(client.post("/generate", json={"recipe": recipe}), 422, "invalid-request")["detail"]
    uploaded = client.post("/generate", files={"file": png_with(json.dumps(recipe))})
    assert words.removeprefix("recipe.") in problem(uploaded, 422, "invalid-request")["detail"]
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize("more", [{"labels": LISTS}, {"steps": 3}, {"seed": 7}, {"model": "toy"}])
def test_a_recipe_stands_alone(client: httpx.Client, alive: JobStore, settings: Settings, more: dict[str, Any]) -> None:
    recipe = recipe_of_toy(settings)
    (name,) = more
    answers = [client.post("/generate", json={"recipe": recipe, **more})]
    form = {name: json.dumps(value) for name, value in more.items()}
    answers += [client.post("/generate", data=form, files={"file": png_with(json.dumps(recipe))})]
    for answer in answers:
        assert f"without {name}" in problem(answer, 422, "invalid-request")["detail"]
    assert nothing_is_queued(alive.connection)


@pytest.mark.parametrize(
    ("png", "words"),
    [
        (b"", "not a PNG"),
        (b"GIF89a" + b"\0" * 100, "not a PNG"),
        (png_with(None), "without a recipe"),
        (png_with("{"), "recipe cannot be read"),
        (png_with("[" * 100_000), "recipe cannot be read"),
        (png_with("{}"), "version"),
        (png_with(json.dumps(example()))[:60], "damaged"),
        (png_with(json.dumps(example()))[:20], "cut short"),
        (png_with(json.dumps(example()), (8200, 8200)), "8200x8200"),
        (two_headers(png_with(json.dumps(example()), (8200, 8200)), png_with(None)), "4x4, another 8200x8200"),
    ],
)
def test_pngs_without_a_good_recipe(client: httpx.Client, alive: JobStore, png: bytes, words: str) -> None:
    body = problem(client.post("/generate", files={"file": ("x.png", png)}), 422, "invalid-request")
    assert words in body["detail"]
    assert body["errors"][0]["loc"] == ["body", "file"]
    assert nothing_is_queued(alive.connection)


def test_a_form_without_a_file_or_with_two(client: httpx.Client, alive: JobStore) -> None:
    png = png_with(json.dumps(example()))
    assert "file" in problem(client.post("/generate", files={"other": png}), 422, "invalid-request")["detail"]
    form = {"seed": (None, "1")}
    assert "file" in problem(client.post("/generate", files=form), 422, "invalid-request")["detail"]
    twice = [("file", png), ("file", png)]
    response = client.post("/generate", files=twice)
    assert response.status_code in (400, 422)
    assert nothing_is_queued(alive.connection)


def test_a_form_may_be_larger_than_json_and_is_bounded(settings: Settings, alive: JobStore) -> None:
    limits = {"body_limit_bytes": 2000, "upload_limit_bytes": 20_000}
    png = png_with(json.dumps(example()))
    with serving(settings.model_copy(update=limits)) as client:
        problem(client.post("/generate", json={"labels": [["x" * 3000]]}), 413, "content-too-large")
        fits = png_with(json.dumps(example() | {"labels": [["x" * 3000]]}))
        problem(client.post("/generate", files={"file": fits}), 422, "unknown-checkpoint")
        problem(client.post("/generate", files={"file": png + b"\0" * 20_000}), 413, "content-too-large")


def test_an_idempotency_key_tells_recipes_apart(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    headers = {"idempotency-key": "k", "prefer": "respond-async"}
    recipe = recipe_of_toy(settings)
    first = client.post("/generate", json={"recipe": recipe}, headers=headers).json()["id"]
    upload = {"file": png_with(json.dumps(recipe))}
    assert client.post("/generate", files=upload, headers=headers).json()["id"] == first
    other = client.post("/generate", json={"recipe": recipe | {"first": 1}}, headers=headers)
    problem(other, 422, "idempotency-key-reused")


def test_the_documents_example_is_a_recipe() -> None:
    text = ROOT.joinpath("docs", "recipes.md").read_text()
    block = text.split("```json\n")[1].split("```")[0]
    recipe = Recipe.model_validate_json(block)
    assert set(json.loads(block)) == set(Recipe.model_fields)
    assert set(json.loads(block)["options"]) == set(SamplingOptions.model_fields)
    assert len(recipe.verdicts) == len(recipe.labels)


WHOLE = png_with(json.dumps(example()))


@given(
    cut=st.integers(0, len(WHOLE)),
    changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4),
)
def test_damaged_pngs_are_refused_or_read_right(cut: int, changes: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE)
    for position, value in changes:
        content[position] = value
    try:
        recipe = recipe_of(bytes(content[:cut]))
    except PngError:
        return
    assert recipe == Recipe.model_validate(example())  # chunks have checksums: what is read is what was written


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=100)
models = st.builds(MadeWith, name=texts, digest=st.text("0123456789abcdef", min_size=64, max_size=64))
verdicts = st.builds(
    RecipeVerdict,
    accuracy=fractions,
    exact=st.booleans(),
    f1=fractions,
    scores=st.dictionaries(texts, fractions, max_size=MAX_SCORES),
)
layouts = st.lists(st.builds(Point, x=fractions, y=fractions), max_size=8)
recipes = st.builds(
    lambda first, labels, **more: Recipe(first=first - len(labels), labels=labels, **more),
    version=st.just(1),
    model=models,
    labels=st.lists(st.lists(texts, max_size=8), max_size=5),
    layouts=st.none() | st.lists(st.none() | layouts, max_size=5),
    seed=st.integers(0, MAX_SEED),
    first=st.integers(5, 2**31),
    options=sampling_options,
    trajectory=st.none() | st.integers(2, MAX_STAGES),
    columns=st.integers(1, LIMITS.max_columns),
    evaluator=st.none() | models,
    verdicts=st.lists(verdicts, max_size=3),
)
PIXELS = np.zeros((2, 3, 3), np.uint8)


@given(recipes)
def test_a_png_gives_its_whole_recipe_back(recipe: Recipe) -> None:
    assert recipe_of(png_bytes(PIXELS, recipe.text())) == recipe


@given(
    any_json.map(json.dumps)
    | texts
    | st.builds(
        lambda name, value: json.dumps(example() | {name: value}),
        texts | st.sampled_from([*Recipe.model_fields]),
        any_json,
    )
)
def test_any_text_is_a_recipe_or_refused(text: str) -> None:
    try:
        recipe = recipe_of(png_with(text))
    except PngError:
        return
    assert recipe_of(png_bytes(PIXELS, recipe.text())) == recipe


WHOLE = png_with(json.dumps(example()))


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(WHOLE)))
def test_damaged_pngs_have_their_recipe_or_none(changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(WHOLE)
    for at, byte in changes:
        content[at] = byte
    try:
        recipe = recipe_of(bytes(content[: len(content) - cut]))
    except PngError:
        return
    assert recipe.version == 1
