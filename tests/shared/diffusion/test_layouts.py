"""Layouts: the prior over them, the map that the network sees, and what a seed determines."""

import pytest
import torch

from shared.diffusion.conditioning import PositionMap
from shared.diffusion.denoise import Stepper
from shared.diffusion.layouts import OUTSIDE, Layouts, with_positions
from shared.diffusion.schedules import alpha_bar
from shared.diffusion.unet import NetworkConfig, UNet
from shared.options import SamplingOptions
from tests.trainer_fixtures import NETWORK

LABELS = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1]])
POSITIONS = torch.tensor(
    [
        [[0.12, 0.22], [OUTSIDE, OUTSIDE], [OUTSIDE, OUTSIDE]],
        [[0.3, 0.4], [0.5, 0.6], [OUTSIDE, OUTSIDE]],
        [[OUTSIDE, OUTSIDE], [0.7, 0.8], [0.9, 0.1]],
    ]
)


def test_a_drawn_layout_is_one_of_the_training_pictures_assigned_to_the_labels() -> None:
    layouts = Layouts.of(POSITIONS, count=16)
    assert layouts.points.shape == (2, 16, 2, 2)
    assert torch.equal(layouts.points, Layouts.of(POSITIONS, count=16).points)  # the same data, the same checkpoint
    pairs = {((0.3, 0.4), (0.5, 0.6)), ((0.7, 0.8), (0.9, 0.1))}
    seen = set()
    for seed in range(64):
        drawn = layouts.draw(torch.tensor([1.0, 0, 1]), torch.Generator().manual_seed(seed))
        assert drawn[1].tolist() == [OUTSIDE, OUTSIDE]
        first, second = (tuple(round(v, 4) for v in drawn[k].tolist()) for k in (0, 2))
        seen.add((first, second))
    assert seen == pairs | {(b, a) for a, b in pairs}


def test_layouts_with_objects_close_together_are_left_out() -> None:
    apart = [0.1, 0.2, 0.3, 0.4, 0.5]
    positions = torch.tensor([[[0.4, 0.5], [0.4 + d, 0.5]] for d in apart])
    points = Layouts.of(positions, count=64).points[1]
    left = {round(d, 3) for d in (points[:, 1] - points[:, 0]).norm(dim=1).tolist()}
    assert left == {0.3, 0.4, 0.5}


@pytest.mark.parametrize("labels", [[0.0, 0, 0], [1.0, 1, 1]])
def test_no_labels_or_too_many_labels_have_unknown_positions(labels: list[float]) -> None:
    drawn = Layouts.of(POSITIONS).draw(torch.tensor(labels), torch.Generator().manual_seed(0))
    assert bool((drawn == OUTSIDE).all())


def test_the_map_peaks_at_the_position_and_is_zero_for_absent_labels_and_unknown_positions() -> None:
    place = PositionMap(num_labels=3, channels=1)
    place.requires_grad_(False)
    torch.nn.init.ones_(place.vectors)
    spread = place(LABELS, POSITIONS, 20, 20)[:, 0]  # (3, H, W)
    assert divmod(int(spread[0].argmax()), 20) == (4, 2)
    assert float(spread[1].sum()) == pytest.approx(2 * float(spread[0].sum()), rel=0.1)
    assert float(place(LABELS, torch.full_like(POSITIONS, OUTSIDE), 20, 20).abs().max()) == 0
    assert float(place(0 * LABELS, POSITIONS, 20, 20).abs().max()) == 0


def test_the_map_has_the_dtype_of_its_vectors_and_the_networks_layout() -> None:
    place = PositionMap(num_labels=3, channels=4).requires_grad_(False)
    exact = place(LABELS, POSITIONS, 20, 20)
    assert exact.is_contiguous(memory_format=torch.channels_last)
    half = place.bfloat16()(LABELS, POSITIONS, 20, 20)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.02, rtol=0.02)


def network(positions: bool = True) -> UNet:
    torch.manual_seed(0)
    unet = UNet(NetworkConfig(num_labels=3, image_size=16, positions=positions, **NETWORK)).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


def test_positions_change_the_prediction_unless_labels_are_dropped() -> None:
    unet, x, t = network(), torch.randn(3, 3, 16, 16), torch.tensor([10, 500, 900])
    there, elsewhere = with_positions(LABELS, POSITIONS), with_positions(LABELS, 1 - POSITIONS)
    keep = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        assert not torch.allclose(unet(x, t, there, keep), unet(x, t, elsewhere, keep))
        assert torch.equal(unet(x, t, there, ~keep), unet(x, t, elsewhere, ~keep))
        nowhere = with_positions(LABELS, torch.full_like(POSITIONS, OUTSIDE))
        torch.testing.assert_close(unet(x, t, nowhere, keep), unet(x, t, LABELS, keep))


def test_a_seed_determines_noise_and_layout_and_the_noise_does_not_depend_on_layouts() -> None:
    ab, layouts, options = alpha_bar("cosine", 50), Layouts.of(POSITIONS), SamplingOptions(steps=2)
    with_layouts, without = Stepper(network(), ab, "v", layouts=layouts), Stepper(network(False), ab, "v")
    one, again, other = (with_layouts.new_row([1, 1, 0], options, seed) for seed in (5, 5, 6))
    assert torch.equal(one.labels, again.labels)
    assert one.labels.shape == (3, 3)
    assert torch.equal(one.x, without.new_row([1, 1, 0], options, 5).x)
    assert not torch.equal(one.x, other.x)
