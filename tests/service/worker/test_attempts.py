"""Verdicts on attempts, with distances from the places asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from service.contract.options import PictureOptions
from service.contract.records import Picture, Point, Verdict
from service.worker.attempts import judge_pictures
from shared.vocabulary import Vocabulary

THREE = ("red cube", "blue cube", "gray sphere")
PLACES = torch.tensor([[0.5, 0.5], [0.25, 0.5], [0.75, 0.9]])  # of the labels, in every picture


class Locating:
    """Finds the first two labels in every picture, each at its place in PLACES, moved right by the picture's number."""

    vocabulary = Vocabulary(THREE)

    def __init__(self) -> None:
        self.located = list[list[float]]()  # the numbers of the pictures located in each call

    def probabilities(self, images: Tensor) -> Tensor:
        return torch.tensor([0.9, 0.8, 0.1]).expand(len(images), 3)

    def positions(self, images: Tensor) -> Tensor | None:
        numbers = images[:, 0, 0, 0]
        self.located.append(numbers.tolist())
        return PLACES + torch.stack([numbers, torch.zeros(len(images))], dim=1)[:, None]


class LabelsOnly(Locating):
    def positions(self, images: Tensor) -> Tensor | None:
        return None


def placed(index: int, *labels: str, places: list[tuple[float, float]] | None = None) -> Picture:
    layout = None if places is None else tuple(Point(x=x, y=y) for x, y in places)
    asked: dict[str, Any] = {"labels": labels, "layout": layout, "seed": 1, "options": PictureOptions()}
    return Picture(job="a", index=index, run_seed=7, position=index, **asked)


PICTURES = [
    placed(0, "blue cube", "red cube", places=[(0.25, 0.75), (0.5, 0.5)]),
    placed(1, "red cube"),
    placed(2, "gray sphere", "red cube", places=[(0.75, 0.9), (0.5, 0.25)]),
]


def images(height: int, width: int) -> Tensor:
    """Three pictures, which `Locating` finds moved by 0, 1/8 and 1/4 of the width."""
    return torch.tensor([0.0, 0.125, 0.25])[:, None, None, None].expand(3, 3, height, width)


def located_in(judge: Locating, height: int = 24, width: int = 32) -> list[Verdict]:
    places = [picture.layout and tuple((at.x, at.y) for at in picture.layout) for picture in PICTURES]
    return judge_pictures(judge, PICTURES, images(height, width), places)


def test_distances_are_in_widths_and_in_the_order_of_the_labels() -> None:
    judge = Locating()
    first, second, third = located_in(judge)
    assert first.distances == pytest.approx((0.25 * 24 / 32, 0.0))
    assert second.distances is None  # no layout was asked for
    assert judge.located == [[0.0, 0.25]]
    assert third.distances is not None
    assert third.distances[0] is None  # the gray sphere is not found
    assert third.distances[1] == pytest.approx((0.25**2 + (0.25 * 0.75) ** 2) ** 0.5)
    assert located_in(Locating(), 32, 16)[0].distances == (0.5, 0.0)  # of a tall picture


def test_an_evaluator_that_knows_no_places_gives_no_distances() -> None:
    assert [verdict.distances for verdict in located_in(LabelsOnly())] == [None, None, None]
