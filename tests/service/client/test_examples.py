"""The examples of the client: a grid of the same pictures with several options, and a gallery."""

import io
import re
import runpy
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageChops

from service.contract.recipe import Recipe
from service.worker.runner import Runner
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def address(client: httpx.Client, working: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELGRID_URL", str(client.base_url))


def test_the_sweep_draws_every_combination_from_one_seed(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "sweep.png"
    options = ["--steps", "1", "2", "--guidance", "1", "2.5", "--seed", "5"]
    monkeypatch.setattr("sys.argv", ["sweep.py", str(output), "red cube, gray cube", "blue sphere", *options])
    runpy.run_path(str(ROOT / "examples/sweep.py"), run_name="__main__")

    jobs = [client.get(f"/jobs/{head['id']}").json() for head in reversed(client.get("/jobs").json()["jobs"])]
    asked = [(job["options"]["steps"], job["options"]["guidance"], job["seed"]) for job in jobs]
    assert asked == [(1, 1.0, 5), (1, 2.5, 5), (2, 1.0, 5), (2, 2.5, 5)]
    sheet = Image.open(output)
    grids = [Image.open(io.BytesIO(client.get(f"/jobs/{job['id']}/grid.png").content)) for job in jobs]
    for (row, column), grid in zip(((0, 0), (0, 1), (1, 0), (1, 1)), grids, strict=True):
        left, bottom = sheet.width // 2 * column, sheet.height // 2 * (row + 1)
        drawn = sheet.crop((left, bottom - grid.height, left + grid.width, bottom))
        assert ImageChops.difference(drawn, grid.convert("RGB")).getbbox() is None


def test_the_gallery_has_every_picture_with_its_labels_and_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    monkeypatch.setattr("sys.argv", ["gallery.py", str(page)])
    gallery = runpy.run_path(str(ROOT / "examples/gallery.py"))
    lists = [["red cube", "gray cube"], ["blue sphere"]]
    gallery["main"]([gallery["Part"]("two", "Two pictures", "toy", lists)])
    tags = re.findall(r'<img src="([^"]+)" title="([^"]+)"', page.read_text())
    assert tags == [("two-0.png", "red cube, gray cube"), ("two-1.png", "blue sphere")]
    for (source, _), labels in zip(tags, lists, strict=True):
        with Image.open(tmp_path / source) as picture:
            recipe = Recipe.model_validate_json(picture.info["labelgrid"])
        assert (recipe.labels, recipe.seed) == ([labels], gallery["SEED"])
