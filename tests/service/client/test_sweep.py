"""The example of the client: a grid of the same pictures with several options."""

import io
import runpy
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageChops

from service.worker.runner import Runner
from tests.paths import ROOT


def test_the_example_draws_every_combination_from_one_seed(
    client: httpx.Client, working: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "sweep.png"
    options = ["--steps", "1", "2", "--guidance", "1", "2.5", "--seed", "5"]
    monkeypatch.setattr("sys.argv", ["sweep.py", str(output), "red cube, gray cube", "blue sphere", *options])
    monkeypatch.setenv("LABELGRID_URL", str(client.base_url))
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
