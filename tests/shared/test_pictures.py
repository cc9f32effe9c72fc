"""Grids and PNGs compared with torchvision and Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from shared.pictures import RIGHT, WRONG, grid, marked_grid, png_bytes, read_png, sheet, to_uint8


@pytest.mark.parametrize(("count", "columns"), [(1, 8), (3, 8), (5, 2), (8, 8), (9, 3)])
def test_a_grid_equals_torchvisions(count: int, columns: int) -> None:
    images = torch.rand(count, 3, 6, 4, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2
    expected = make_grid(images.clamp(-1, 1), nrow=columns, padding=2, pad_value=-1.0)
    assert np.array_equal(grid(images, columns), to_uint8(expected[None])[0])
    assert np.array_equal(sheet(to_uint8(images), columns), grid(images, columns))


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (3, 1), (1, 300)])
@pytest.mark.parametrize("values", [1, 256])
def test_a_png_has_the_pixels_and_the_text(size: tuple[int, int], values: int) -> None:
    pixels = np.random.default_rng(0).integers(0, values, (*size, 3), dtype=np.uint8)
    png = png_bytes(pixels, {"key": "värde"})
    assert np.array_equal(read_png(png), pixels)
    assert Image.open(io.BytesIO(png)).info["key"] == "värde"


def test_the_grid_marks_by_colour_and_by_shape() -> None:
    pictures = np.zeros((3, 64, 64, 3), np.uint8)
    sheet = marked_grid(pictures, [True, False, True], columns=2)[2:, 2:]
    h, w = sheet.shape[0] // 2, sheet.shape[1] // 2
    cells = [sheet[y : y + h, x : x + w] for y, x in ((0, 0), (0, w), (h, 0), (h, w))]
    marks = []
    for cell, colour in zip(cells, (RIGHT, WRONG, RIGHT), strict=False):
        assert (cell == colour).all(axis=2).sum() > 500
        assert (cell == (WRONG if colour == RIGHT else RIGHT)).all(axis=2).sum() == 0
        marks.append((cell == 255).all(axis=2))
        assert marks[-1].sum() > 20
    assert not cells[3].any()  # nothing is there
    assert np.array_equal(marks[0], marks[2])
    assert (marks[0] != marks[1]).sum() > 20
