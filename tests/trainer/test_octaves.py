"""The power in each octave of spatial frequency."""

import math

import pytest
import torch
from torch import Tensor

from trainer.octaves import octave_power, without_dots


def waves(period: float) -> Tensor:
    """Vertical stripes around a mean that does not count, (1, 3, 64, 96)."""
    x = torch.arange(96) * (2 * math.pi / period)
    return (0.5 + x.sin()).expand(1, 3, 64, 96)


@pytest.mark.parametrize(("period", "octave"), [(3.0, 0), (6.0, 1), (12.0, 2), (24.0, 3)])
def test_stripes_have_their_power_in_the_octave_of_their_period(period: float, octave: int) -> None:
    power = octave_power(waves(period))
    assert len(power) == 5
    assert float(power[octave] / power.sum()) > 0.98
    across = octave_power(waves(period).transpose(-1, -2))
    torch.testing.assert_close(across, power, rtol=1e-3, atol=1e-3 * float(power.sum()))


def test_power_is_that_of_the_pixels() -> None:
    """Parseval's theorem; only the periods longer than half of the shorter side are left out."""
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    window = torch.outer(torch.hann_window(32, periodic=False), torch.hann_window(32, periodic=False))
    pixels = ((x - x.mean((-2, -1), keepdim=True)) * window).square().mean((0, 1)).sum() * 32 * 32
    assert float(octave_power(x).sum() / pixels) == pytest.approx(1, abs=0.03)


def test_single_dots_are_removed_and_edges_stay() -> None:
    edge = torch.zeros(1, 1, 6, 6)
    edge[..., 3:] = 1
    assert torch.equal(without_dots(edge), edge)
    dotted = edge.clone()
    dotted[0, 0, 2, 1], dotted[0, 0, 4, 4] = 0.5, -0.2
    assert torch.equal(without_dots(dotted), edge)
