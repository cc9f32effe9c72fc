"""The sliced Wasserstein distance by which the best weights of adversarial training are chosen."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.objectives.sliced import octaves, sliced_distance


def squares(seed: int, shift: int = 0) -> Tensor:
    """Pictures (8, 3, 64, 64) of some sharp rectangles each, all of them moved to the right by `shift` pixels."""
    generator, x = torch.Generator().manual_seed(seed), torch.zeros(8, 3, 64, 64)
    for picture in x:
        for row, column, height, width in torch.randint(8, 40, (4, 4), generator=generator).tolist():
            colour = torch.rand(3, 1, 1, generator=generator)
            picture[:, row : row + height // 2, column + shift : column + shift + width // 2] = colour
    return x


def blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, [2] * 4, mode="replicate"), 5, 1)


def test_edges_elsewhere_cost_less_than_blur_though_pixels_say_the_opposite() -> None:
    real, shifted = squares(0), squares(0, shift=3)
    smooth = blurred(real)
    assert (shifted - real).abs().mean() > 1.2 * (smooth - real).abs().mean()
    assert sliced_distance(shifted, real) < 0.5 * sliced_distance(smooth, real)
    assert sliced_distance(squares(1), real) < sliced_distance(blurred(squares(1)), real)


def test_noise_costs_as_blur_does_and_it_grows_with_both() -> None:
    real, grain = squares(0), torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = [sliced_distance(real + strength * grain, real) for strength in (0.0, 0.01, 0.03, 0.1)]
    assert noisy[0] == 0
    assert noisy == sorted(noisy)
    twice = blurred(blurred(real))
    assert 0.01 < sliced_distance(blurred(real), real) < sliced_distance(twice, real)


def test_it_is_the_wasserstein_distance_of_known_distributions() -> None:
    """Both sets have a single patch value: then each projection differs by |direction . difference|."""
    made, real = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, 1, 8, 8)
    real[1] = 1.0  # half of the patches is 0, half is 1; the deviation is 0.5
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        torch.randint(2, (2, 128), generator=generator)
    directions = torch.randn(49, 128, generator=generator)
    sums = (directions / directions.norm(dim=0)).sum(0)
    # sorted: from 0.5 to 0 and from 0.5 to 1, each for half of the patches
    assert sliced_distance(made, real) == pytest.approx(float(0.5 * sums.abs().mean() / 0.5), rel=1e-5)


def test_octaves_add_up_to_the_picture() -> None:
    x = torch.rand(1, 3, 60, 82, generator=torch.Generator().manual_seed(0))
    finest, coarsest = octaves(x)
    assert coarsest.shape == (1, 3, 30, 41)
    again = finest + F.interpolate(coarsest, x.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(again, x)
    assert len(list(octaves(torch.zeros(1, 3, 240, 320)))) == 4
