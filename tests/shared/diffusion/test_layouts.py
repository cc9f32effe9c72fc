"""Layouts: the prior over them, the map that the network sees, and what a seed determines."""

import pytest
import torch

from shared.diffusion.conditioning import PositionMap
from shared.diffusion.denoise import Stepper
from shared.diffusion.layout_draws import LayoutDrawer
from shared.diffusion.layouts import DRAWS, OUTSIDE, LayoutConfig, LayoutNetwork, positions_at, with_positions
from shared.diffusion.path import NoisePath
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


def layout_network(cells: int = 4, most: int = 2) -> LayoutNetwork:
    torch.manual_seed(0)
    return LayoutNetwork(LayoutConfig(num_labels=3, most=most, cells=cells, width=16, layers=2, heads=2)).eval()


def test_the_densities_of_all_cells_add_up_to_one() -> None:
    network = layout_network(cells=3)
    middles = (torch.arange(9) + 0.5) / 9
    grid = torch.cartesian_prod(middles, middles)[:, None]  # (81, 1, 2)
    with torch.no_grad():
        nats = network(torch.ones(81, 1, dtype=torch.int64), grid)
    assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-5)


def test_a_position_depends_on_earlier_ones_only() -> None:
    network = layout_network(most=3)
    indices, positions = torch.tensor([[2, 0, 1]]), torch.rand(1, 3, 2, generator=torch.Generator().manual_seed(1))
    moved = positions.clone()
    moved[0, 1] = 1 - moved[0, 1]
    with torch.no_grad():
        one, other = network(indices, positions)[0], network(indices, moved)[0]
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert one[2] != other[2]


def test_cells_are_drawn_as_often_as_the_network_says() -> None:
    network, draws = layout_network(cells=2, most=1), 1000
    generator, drawer = torch.Generator().manual_seed(3), LayoutDrawer(network)
    points = drawer.draw(torch.tensor([[0.0, 1, 0]] * draws), [generator] * draws)[:, 1]
    found = torch.bincount((points * 4).long() @ torch.tensor([4, 1]), minlength=16) / draws
    grid = torch.cartesian_prod(*[(torch.arange(4) + 0.5) / 4] * 2)[:, None]
    with torch.no_grad():
        wanted = torch.exp(-network(torch.ones(16, 1, dtype=torch.int64), grid))[:, 0]
    assert float((found - wanted).abs().max()) < 4 * float((wanted * (1 - wanted) / draws).sqrt().max())


@torch.inference_mode()
def drawn_by_modules(network: LayoutNetwork, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw as `step` says, which an exported network offers: the whole network again for each of an object's cells."""
    most, cells = network.config.most, network.config.cells
    present = torch.nonzero(labels).flatten()
    present = present[torch.randperm(len(present), generator=generator)]
    objects, places = torch.zeros(most, dtype=torch.int64), torch.zeros(most, 2)
    objects[: len(present)] = present
    for j in range(len(present)):
        drawn = torch.zeros(DRAWS, dtype=torch.int64)
        for i in range(DRAWS):
            logits = network.step(objects, places, drawn, torch.tensor([j]), torch.tensor([len(present)]))[i]
            u = torch.rand((), generator=generator, dtype=torch.float64)
            drawn[i] = torch.searchsorted(logits.double().softmax(-1).cumsum(-1), u).clamp(max=cells - 1)
        row, column, fine_row, fine_column = drawn.tolist()
        inside = torch.rand(2, generator=generator).flip(0) / cells**2  # drawn as row, column
        corner = [(column * cells + fine_column) / cells**2, (row * cells + fine_row) / cells**2]
        places[j] = torch.tensor(corner) + inside
    return positions_at(present.tolist(), places[: len(present)].tolist(), len(labels))


@pytest.mark.parametrize("labels", [[1.0, 0, 0], [0.0, 1, 1], [1.0, 1, 1]])
def test_positions_are_drawn_from_the_network(labels: list[float]) -> None:
    network = layout_network(cells=8, most=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2).add_(0.05 * torch.randn(parameter.shape))  # so that nothing is nearly zero
    for seed in range(5):
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        (drawn,) = LayoutDrawer(network).draw(torch.tensor([labels]), [one])
        torch.testing.assert_close(drawn, drawn_by_modules(network, torch.tensor(labels), other))


def test_torch_draws_on_one_thread_and_has_its_own_number_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network, found, before = layout_network(), set[int](), torch.get_num_threads()
    monkeypatch.setattr(network.norm, "forward", lambda h: [found.add(torch.get_num_threads()), h][1])
    torch.set_num_threads(3)
    try:
        LayoutDrawer(network).draw(LABELS, [torch.Generator() for _ in LABELS])
        assert (found, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def test_positions_are_the_same_in_every_batch() -> None:
    labels = torch.cat([torch.zeros(1, 3), torch.eye(3), 1 - torch.eye(3), torch.ones(1, 3)]).repeat(4, 1)
    drawer = LayoutDrawer(layout_network(cells=8, most=3))
    together = drawer.draw(labels, [torch.Generator().manual_seed(seed) for seed in range(len(labels))])
    for seed, drawn in enumerate(together):
        (alone,) = drawer.draw(labels[seed : seed + 1], [torch.Generator().manual_seed(seed)])
        assert torch.equal(drawn, alone)


@pytest.mark.parametrize("labels", [[0.0, 0, 0], [1.0, 1, 1]])
def test_no_labels_or_too_many_labels_have_unknown_positions(labels: list[float]) -> None:
    drawn = LayoutDrawer(layout_network()).draw(torch.tensor([labels]), [torch.Generator().manual_seed(0)])
    assert bool((drawn == OUTSIDE).all())


def test_the_map_peaks_at_the_position_and_is_zero_for_absent_labels_and_unknown_positions() -> None:
    place = PositionMap(num_labels=3, channels=1, spread=0.045)
    place.requires_grad_(False)
    torch.nn.init.ones_(place.vectors)
    spread = place(LABELS, POSITIONS, None, 20, 20)[:, 0]  # (3, H, W)
    assert divmod(int(spread[0].argmax()), 20) == (4, 2)
    assert float(spread[1].sum()) == pytest.approx(2 * float(spread[0].sum()), rel=0.1)
    assert float(place(LABELS, torch.full_like(POSITIONS, OUTSIDE), None, 20, 20).abs().max()) == 0
    assert float(place(0 * LABELS, POSITIONS, None, 20, 20).abs().max()) == 0


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
    ab, layouts, options = alpha_bar("cosine", 50), LayoutDrawer(layout_network()), SamplingOptions(steps=2)
    with_layouts, without = (
        Stepper(network(), NoisePath(ab, "v"), layouts=layouts),
        Stepper(network(False), NoisePath(ab, "v")),
    )
    one, again, other = (with_layouts.new_row([1, 1, 0], options, seed) for seed in (5, 5, 6))
    assert torch.equal(one.labels, again.labels)
    assert one.labels.shape == (3, 3)
    assert torch.equal(one.x, without.new_row([1, 1, 0], options, 5).x)
    assert not torch.equal(one.x, other.x)
