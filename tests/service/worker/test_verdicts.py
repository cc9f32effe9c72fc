"""Verdicts: distances from the places asked for; `test_engine.py` and `test_score.py` have the scores."""

import pytest
import torch
from torch import Tensor

from service.contract.recipe import MadeWith, of_picture
from service.contract.records import Picture, Point, Verdict
from service.worker.judge import judge_pictures
from shared.options import SamplingOptions
from shared.vocabulary import Vocabulary

NAMES = ("red cube", "blue cube", "gray sphere")
PLACES = torch.tensor([[0.5, 0.5], [0.25, 0.5], [0.75, 0.9]])  # of the labels, in every picture


class Locating:
    """Finds the first two labels in every picture, each at its place in PLACES, moved right by the picture's number."""

    vocabulary = Vocabulary(NAMES)

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


def picture(index: int, *labels: str, places: list[tuple[float, float]] | None = None) -> Picture:
    layout = None if places is None else tuple(Point(x=x, y=y) for x, y in places)
    return Picture(
        job="a",
        index=index,
        labels=labels,
        layout=layout,
        seed=1,
        options=SamplingOptions(),
        run_seed=7,
        position=index,
    )


PICTURES = [
    picture(0, "blue cube", "red cube", places=[(0.25, 0.75), (0.5, 0.5)]),
    picture(1, "red cube"),
    picture(2, "gray sphere", "red cube", places=[(0.75, 0.9), (0.5, 0.25)]),
]


def images(height: int, width: int) -> Tensor:
    """Three pictures, which `Locating` finds moved by 0, 1/8 and 1/4 of the width."""
    return torch.tensor([0.0, 0.125, 0.25])[:, None, None, None].expand(3, 3, height, width)


def judged(judge: Locating, height: int = 24, width: int = 32) -> list[Verdict]:
    return judge_pictures(judge, PICTURES, images(height, width))


def test_distances_are_in_widths_and_in_the_order_of_the_labels() -> None:
    judge = Locating()
    first, second, third = judged(judge)
    assert first.distances == pytest.approx((0.25 * 24 / 32, 0.0))
    assert second.distances is None  # no layout was asked for
    assert judge.located == [[0.0, 0.25]]
    assert third.distances is not None
    assert third.distances[0] is None  # the gray sphere is not found
    assert third.distances[1] == pytest.approx((0.25**2 + (0.25 * 0.75) ** 2) ** 0.5)


def test_the_picture_may_be_square_or_tall() -> None:
    assert [judged(Locating(), *size)[0].distances for size in ((16, 16), (32, 16))] == [(0.25, 0.0), (0.5, 0.0)]


def test_an_evaluator_that_knows_no_places_gives_no_distances() -> None:
    assert [verdict.distances for verdict in judged(LabelsOnly())] == [None, None, None]


def test_distances_are_stored_and_are_in_the_recipe() -> None:
    verdict = judged(Locating())[2]
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    assert verdict.shown(3, 3)["distances"] == [None, 0.312]
    recipe = of_picture(PICTURES[2], verdict, MadeWith(name="m", digest="d" * 64), None)
    assert recipe is not None
    assert '"distances":[null,0.31]' in recipe.text()["labelgrid"]
    older = verdict.model_dump(exclude={"distances"})
    assert Verdict.model_validate(older).distances is None
