"""The distance between the patches of two pictures: of blur, shifts and dots."""

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.stages.patches import WINDOW, random_directions, sliced_distance

DIRECTIONS = random_directions(16, torch.Generator().manual_seed(0)).flatten(0, 1)


def edge(at: int) -> Tensor:
    """Two windows by two, dark to the left of column `at`."""
    picture = torch.ones(1, 3, 2 * WINDOW, 2 * WINDOW)
    picture[..., :at] = -1
    return picture


def distance(made: Tensor, target: Tensor) -> float:
    return float(sliced_distance(made, target, DIRECTIONS))


def test_directions_are_unit_vectors() -> None:
    assert DIRECTIONS.shape == (32, 3, 3, 3)
    torch.testing.assert_close(DIRECTIONS.flatten(1).norm(dim=1), torch.ones(32))


def test_a_blurred_edge_is_further_away_than_a_shifted_one_though_its_error_is_less() -> None:
    target, shifted = edge(8), edge(9)
    blurred = F.avg_pool2d(F.pad(target, (2, 2, 0, 0), mode="replicate"), (1, 5), 1)
    assert distance(target, target) == 0
    assert (blurred - target).abs().mean() < 1.3 * (shifted - target).abs().mean()
    assert distance(blurred, target) > 2 * distance(shifted, target)


def test_dots_cost_where_the_original_has_none() -> None:
    target, shifted = edge(8), edge(9)
    dotted = target.clone()
    dotted[..., ::4, 8] = -1
    costs = [distance(made, target) / float((made - target).abs().mean()) for made in (dotted, shifted)]
    assert costs[0] > 2 * costs[1]


def test_places_inside_a_window_do_not_count_and_windows_do() -> None:
    generator = torch.Generator().manual_seed(0)
    texture = torch.zeros(1, 3, 2 * WINDOW, 2 * WINDOW)
    texture[..., 4:8, 4:8] = torch.rand(3, 4, 4, generator=generator)
    assert distance(texture.roll((2, 2), (2, 3)), texture) < 1e-6
    assert distance(texture.roll(WINDOW, 3), texture) > 1e-3
