"""What a model has learnt, and what it refuses with which words."""

import pytest
from pydantic import ValidationError

from shared.options import LIMITS
from shared.support import Support, picture_size, support_of

SQUARE = ((0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8))


@pytest.mark.parametrize(
    ("objects", "count", "problem"),
    [
        ((1, 3), 1, None),
        ((1, 3), 3, None),
        ((1, 3), 4, "4 labels; this model has learnt pictures of 1 to 3 objects"),
        ((2, 2), 1, "1 labels; this model has learnt pictures of 2 objects"),
        ((0, 2), 3, "3 labels; this model has learnt pictures of 1 to 2 objects"),
    ],
)
def test_number_of_objects(objects: tuple[int, int], count: int, problem: str | None) -> None:
    assert Support(objects=objects).count_problem(count) == problem


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ([(0.5, 0.5)], None),
        ([(0.185, 0.5)], None),  # within the tolerance
        ([(0.17, 0.5)], "[0.17, 0.5] is outside"),
        ([(0.184, 0.184)], "[0.184, 0.184] is outside"),  # of the corner, though not far from either edge's line
        ([(0.187, 0.187)], None),
        ([(0.5, 0.83)], "[0.5, 0.83] is outside"),
        ([(0.3, 0.5), (0.6, 0.5)], None),
        ([(0.3, 0.5), (0.4, 0.5)], "[0.3, 0.5] and [0.4, 0.5] are 0.100 apart"),
    ],
)
def test_layout(places: list[tuple[float, float]], problem: str | None) -> None:
    found = Support(objects=(1, 3), area=SQUARE, nearest=0.15).layout_problem(places)
    assert found == problem if problem is None else found is not None and found.startswith(problem)


@pytest.mark.parametrize("away", [0.02, 0.0201])
def test_the_whole_tolerance_may_be_used(away: float) -> None:
    """Whatever the rounding: 0.2 - 0.18 is more than 0.02."""
    support = Support(objects=(1, 3), area=SQUARE, nearest=0.15)
    edges = [(0.2 - away, 0.5), (0.8 + away, 0.5), (0.5, 0.2 - away), (0.5, 0.8 + away)]
    pairs = [[(x, 0.5), (x + 0.15 - away, 0.5)] for x in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45)]
    refused = [support.layout_problem(places) is not None for places in [*([place] for place in edges), *pairs]]
    assert refused == [away > 0.02] * 10


def test_an_area_of_one_place() -> None:
    support = Support(objects=(1, 1), area=((0.5, 0.4),))
    assert support.layout_problem([(0.51, 0.4)]) is None
    assert support.layout_problem([(0.6, 0.4)]) is not None


@pytest.mark.parametrize(("place", "fits"), [((0.5, 0.5), True), ((0.5, 0.53), False), ((0.95, 0.5), False)])
def test_an_area_that_is_a_line(place: tuple[float, float], fits: bool) -> None:
    support = Support(objects=(1, 1), area=((0.1, 0.5), (0.9, 0.5)))
    assert (support.layout_problem([place]) is None) == fits


def test_a_checkpoint_that_does_not_say_refuses_nothing() -> None:
    support = support_of({})
    assert support.count_problem(LIMITS.max_labels) is None
    assert support.layout_problem([(0.0, 0.0), (0.0, 0.0)]) is None


def test_a_range_is_in_order() -> None:
    with pytest.raises(ValidationError, match="must not exceed"):
        support_of({"support": {"objects": [3, 1]}})


def test_size_of_the_pictures() -> None:
    config = {"network": {"image_size": 64}}
    assert picture_size(config) == (64, 64)
    assert picture_size({**config, "picture": [320, 240]}) == (320, 240)
