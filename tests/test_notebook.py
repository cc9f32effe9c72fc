"""docs/notebook.ipynb runs against a real service, and shows what the committed one shows."""

import ast
import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from service.worker.runner import Runner
from tests.paths import ROOT

NOTEBOOK = ROOT / "docs/notebook.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as Jupyter does: return the value of its last line, if that is an expression."""
    cell = ast.parse(source)
    last = cell.body.pop() if isinstance(cell.body[-1], ast.Expr) else None
    exec(compile(cell, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


def shown(value: Any) -> dict[str, str]:
    """Return what Jupyter stores of a cell's value, by media type."""
    if value is None:
        return {}
    png = {"image/png": base64.b64encode(value._repr_png_()).decode()} if hasattr(value, "_repr_png_") else {}
    return {**png, "text/plain": repr(value)}


def committed(cell: dict[str, Any]) -> dict[str, str]:
    return {key: value for output in cell["outputs"] for key, value in output["data"].items()}


def picture(data: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["image/png"])))


def test_every_cell_runs_and_shows_what_the_committed_one_does(
    client: httpx.Client, working: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABELGRID_URL", str(client.base_url))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    values = [run_cell(cell["source"], names) for cell in cells]
    for cell, value in zip(cells, values, strict=True):
        assert shown(value).keys() == committed(cell).keys(), cell["source"]
    [grid, strip] = [value for value in values if "image/png" in shown(value)]
    second, first = client.get("/jobs").json()["jobs"]
    assert grid == client.get(f"/jobs/{first['id']}/grid.png").content
    assert strip == client.get(f"/jobs/{second['id']}/trajectories/0.png").content
    assert picture(shown(grid)).size[0] > picture(shown(grid)).size[1] > 16  # two toy pictures of 16x16, side by side
    assert picture(shown(strip)).size[0] >= 5 * 16


def test_the_committed_notebook_shows_pictures_and_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    pictures = [picture(committed(cell)) for cell in cells if "image/png" in committed({"outputs": [], **cell})]
    assert [one.format for one in pictures] == ["PNG", "PNG"]
