"""A sweep's grid: each picture in the row and column of its options, with labelled axes."""

import io

import httpx
import numpy as np
from PIL import Image

from service.client import Client
from service.client.sweep import GAP, draw, run_sweep
from service.worker.runner import Runner


def png(color: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


def test_each_picture_is_in_its_row_and_column() -> None:
    colors = {(2, 1.0): (200, 0, 0), (2, 3.0): (0, 200, 0), (8, 1.0): (0, 0, 200), (8, 3.0): (200, 200, 0)}
    drawn = np.asarray(Image.open(io.BytesIO(draw({cell: (png(color), 0.5) for cell, color in colors.items()}))))
    where = {}
    for cell, color in colors.items():
        ys, xs = np.nonzero((drawn == color).all(-1))
        where[cell] = (int(ys.min()), int(xs.min()))
        assert (len(ys), int(ys.max() - ys.min()), int(xs.max() - xs.min())) == (600, 19, 29)
    assert where[2, 1.0][0] == where[2, 3.0][0] < where[8, 1.0][0] == where[8, 3.0][0]
    assert where[2, 3.0][1] - where[2, 1.0][1] == where[8, 3.0][1] - where[8, 1.0][1] == 30 + GAP
    top, left = where[2, 1.0]
    assert (drawn[:top, left:] < 100).any(), "the columns have no names"
    assert (drawn[top:, : left - GAP] < 100).any(), "the rows have no names"


def test_all_pictures_of_a_sweep_have_one_seed(client: httpx.Client, working: Runner) -> None:
    with Client(str(client.base_url)) as own:
        cells = run_sweep(own, [["red cube"]], [1, 2], [1.0, 2.0], seed=5)
        jobs = [own.job(head.id) for head in own.jobs().jobs]
    assert list(cells) == [(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)]
    assert sorted((job.options.steps, job.options.guidance) for job in jobs if job.options) == list(cells)
    assert {job.seed for job in jobs} == {5}
