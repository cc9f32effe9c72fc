"""A sweep: the same pictures with every combination of two options, in a grid whose axes are labelled."""

import functools
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from service.client.connection import Client
from service.client.job_command import until_ctrl_c
from service.client.messages import LabelLists, Options
from service.contract.schemas import GenerateResult

GAP: Final = 6  # pixels between cells
INK, PAPER = (20, 20, 20), (255, 255, 255)

Cell = tuple[int, float]  # steps, guidance


def run_sweep(
    client: Client, labels: LabelLists, steps: Sequence[int], guidance: Sequence[float], *, seed: int = 0,
    model: str | None = None, on_cell: Callable[[], None] = lambda: None,
) -> dict[Cell, tuple[bytes, float]]:  # fmt: skip
    """Generate the label lists with each number of steps and each w, all from one seed.

    Returns (steps, w) -> the grid's PNG and the accuracy. Ctrl-C cancels the current job.
    """
    found: dict[Cell, tuple[bytes, float]] = {}
    for n, w in itertools.product(steps, guidance):
        options: Options = {"seed": seed, "steps": n, "guidance": w}
        if model:
            options["model"] = model
        job = until_ctrl_c(client, functools.partial(Client.generate, labels=labels, **options))
        assert isinstance(job.result, GenerateResult)
        found[n, w] = client.grid(job.id), job.result.accuracy
        on_cell()
    return found


def draw(cells: dict[Cell, tuple[bytes, float]]) -> bytes:
    """Return a PNG with a row for each number of steps and a column for each w."""
    rows, columns = (list(dict.fromkeys(values)) for values in zip(*cells, strict=True))
    pictures = {cell: Image.open(io.BytesIO(png)).convert("RGB") for cell, (png, _) in cells.items()}
    width, height = (max(picture.size[side] for picture in pictures.values()) for side in (0, 1))
    size = max(12, height // 14)
    font = ImageFont.load_default(size)
    names = [f"{n} steps" for n in rows]
    left = int(max(font.getlength(name) for name in names)) + 3 * GAP
    line = size * 3 // 2
    out = Image.new("RGB", (left + (width + GAP) * len(columns), line + (height + line + GAP) * len(rows)), PAPER)
    pen = ImageDraw.Draw(out)
    for j, w in enumerate(columns):
        pen.text((left + (width + GAP) * j + width / 2, line / 2), f"w = {w:g}", INK, font, "mm")
    for i, n in enumerate(rows):
        top = line + (height + line + GAP) * i
        pen.text((left - 2 * GAP, top + height / 2), names[i], INK, font, "rm")
        for j, w in enumerate(columns):
            x = left + (width + GAP) * j
            out.paste(pictures[n, w], (x, top))
            pen.text((x + width / 2, top + height + line / 2), f"accuracy {cells[n, w][1]:.2f}", INK, font, "mm")
    encoded = io.BytesIO()
    out.save(encoded, "PNG")
    return encoded.getvalue()
