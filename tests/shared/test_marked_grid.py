"""The grid of scored pictures marks right and wrong ones."""

import numpy as np
import torch

from shared.evaluator import as_input
from shared.pictures import RIGHT, WRONG, marked_grid, to_images


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
    inside = to_images(pictures)
    assert torch.equal(as_input(inside), inside)
