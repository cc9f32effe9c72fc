"""What draws objects in windows of their own: which is in front, what is absent, at the border, and compiled."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.diffusion.layouts import OUTSIDE
from shared.diffusion.model import CompiledWindows
from shared.diffusion.windows import ObjectWindows, WindowsConfig

LABELS = 3


def windows(objects: int = 3, size: tuple[int, int] = (48, 64), margin: int = 0) -> ObjectWindows:
    """Windows of 20 pixels, in shades of gray, of random weights that cover about half of their pixels."""
    torch.manual_seed(0)
    config = WindowsConfig(labels=LABELS, objects=objects, side=0.3, curves=6, hidden=8, width=16)
    network = ObjectWindows(config, size, 4, 1, margin).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def labels(*objects: tuple[int, float, float], turn: float = 0.0) -> Tensor:
    """Return labels (1, LABELS, 5) of objects: each one's label and place."""
    given = torch.zeros(1, LABELS, 5)
    given[..., 1:3] = OUTSIDE
    for label, x, y in objects:
        given[0, label] = torch.tensor([1, x, y, math.cos(turn), math.sin(turn)])
    return given


def picture(network: ObjectWindows, *given: Tensor) -> Tensor:
    with torch.inference_mode():
        return F.pixel_shuffle(network(torch.cat(given)), network.block)[:, 0]


def test_an_object_is_drawn_in_its_window_alone() -> None:
    drawn = picture(windows(), labels((1, 0.5, 0.5)))[0]
    rows, columns = ((drawn != 0).any(axis).nonzero()[:, 0] for axis in (1, 0))
    # five blocks: at column 32 of 64 from block 6 on, at row 24 of 48 from block 5 on, one block lower
    assert (int(rows[0]), int(rows[-1]) + 1) == (20, 40)
    assert (int(columns[0]), int(columns[-1]) + 1) == (24, 44)


def test_it_moves_with_its_object_by_whole_pixels() -> None:
    network = windows()
    for parameter in network.place.parameters():
        nn.init.zeros_(parameter)  # so that it looks the same at every place
    one, other = (picture(network, labels((0, x, 0.5)))[0] for x in (0.5, 0.5 + 4 / 64))
    torch.testing.assert_close(other[:, 4:], one[:, :-4])
    assert one.abs().max() > 0.1


def test_the_lower_object_is_in_front() -> None:
    network = windows()
    far, near = labels((0, 0.45, 0.4)), labels((1, 0.5, 0.5))
    one, other, both = picture(network, near, far, labels((0, 0.45, 0.4), (1, 0.5, 0.5)))
    with torch.inference_mode():
        drawn = network.windows(near[:, 1], torch.tensor([1]))
    cover = torch.zeros(48, 64)
    cover[20:40, 24:44] = F.pixel_shuffle(drawn.cover, 4)[0, 0]
    torch.testing.assert_close(both, other * (1 - cover) + one, atol=1e-5, rtol=0)
    assert 0.2 < float(cover[20:40, 24:44].mean()) < 0.8


def test_absent_labels_are_not_seen() -> None:
    network, given = windows(), labels((0, 0.5, 0.5))
    absent = given.clone()
    absent[0, 1, 1:3] = 0.4  # a place without its object
    assert torch.equal(picture(network, absent), picture(network, given))
    assert picture(network, labels()).abs().max() == 0


def test_of_too_many_objects_the_lowest_are_drawn() -> None:
    scene = [(0, 0.3, 0.3), (1, 0.5, 0.5), (2, 0.7, 0.7)]
    torch.testing.assert_close(picture(windows(objects=2), labels(*scene)), picture(windows(), labels(*scene[1:])))


@pytest.mark.parametrize("objects", [2, 3])
def test_compiled_it_draws_the_same_also_at_the_border(objects: int) -> None:
    """And of a picture beside others, with as many objects as it draws, fewer, none, or more."""
    network = windows(objects, margin=2)
    scenes = [labels((0, 0.02, 0.03), (1, 0.97, 0.99)), labels(), labels((2, 0.5, 0.4), turn=0.7)]
    given = torch.cat([*scenes, labels((0, 0.4, 0.4), (1, 0.5, 0.5), (2, 0.45, 0.6), turn=2.0)])
    with torch.inference_mode():
        (compiled,), whole = CompiledWindows(network)(given), network(given)
    torch.testing.assert_close(compiled, whole, atol=1e-4, rtol=1e-4)
    assert compiled[0].abs().max() > 0.1
    assert compiled[1].abs().max() == 0


def test_an_edge_is_the_line_or_the_ellipse_that_a_curve_says() -> None:
    """A network whose only weights let an object cover what is inside its first curve."""
    network = windows()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    u, v = ((torch.arange(20) + 0.5 - before) / 16 for before in (8, 4))  # of pixels, from the object's place
    cases = {
        (0.1, 0.6, -0.8, 0.0, 0.0, 0.0): 0.1 + 0.6 * u - 0.8 * v[:, None],
        (0.09, 0.0, 0.0, -1.0, 0.0, -0.5): 0.09 - u * u - 0.5 * (v * v)[:, None],
    }
    with torch.no_grad():
        network.seen.weight[0, 0], network.look.bias[0], network.inner.weight[0, 0] = 1.0, 2.0, 1.0
        network.out.weight[-1, 0], network.out.bias[-1] = 100.0, -200.0
        for curve, inside in cases.items():
            network.curve.bias[:6] = torch.tensor(curve)
            drawn = network.windows(labels((0, 0.5, 0.5))[:, 0], torch.tensor([0]))
            cover = F.pixel_shuffle(drawn.cover, 4)[0, 0]
            assert torch.equal(cover > 0.5, inside > 0), curve
            assert 40 < int((inside > 0).sum()) < 360


def test_it_learns_how_an_object_is_turned() -> None:
    """A disc beside its object's place, a quarter of the way around for each quarter of a turn."""
    torch.manual_seed(0)
    network = ObjectWindows(WindowsConfig(labels=1, side=0.5, curves=6, hidden=16, width=32), (32, 32), 4, 1, 0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    angles = torch.arange(8) * math.pi / 4
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    away = (x - 4 * angles.cos()[:, None, None]).square() + (y - 4 * angles.sin()[:, None, None]).square()
    discs = (3.5 - away.sqrt()).clamp(0, 1)
    given = torch.cat([torch.tensor([1, 0.5, 0.5]).expand(8, 3), angles.cos()[:, None], angles.sin()[:, None]], 1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (F.pixel_shuffle(network(given[:, None]), 4)[:, 0] - discs).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * (discs - discs.mean(0)).square().mean()  # what a picture that does not turn leaves
