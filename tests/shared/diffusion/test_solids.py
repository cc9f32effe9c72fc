"""What paints the solids: where they are seen, by the renderer's count and by their corners, and which is nearer."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from iclevr.scenes.render import visible_pixels
from iclevr.scenes.scene import RADIUS, SceneObject, picture_position, projection
from shared.diffusion.layouts import OUTSIDE
from shared.diffusion.model import CompiledPainter
from shared.diffusion.solids import SOLIDS, Painter
from tests.toy_checkpoint import CAMERA

COVERED, TOP = 0, 1  # of the surfaces that have a colour


def painter(objects: int = 3) -> Painter:
    """A painter of three solids in shades of gray, of random weights."""
    network = Painter(SOLIDS, CAMERA, (240, 320), 4, 1, objects, 0).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def only(surface: int) -> Painter:
    """A painter that paints one surface in white."""
    network = painter()
    for parameter in [*network.colour.parameters(), *network.added.parameters()]:
        nn.init.zeros_(parameter)
    nn.init.ones_(network.colour.bias[surface : surface + 1])
    return network


def labels(*scene: SceneObject) -> Tensor:
    """Return labels (1, 3, 5), one for each solid."""
    given = torch.zeros(1, len(SOLIDS), 5)
    given[..., 1:3] = OUTSIDE
    for one in scene:
        turn = 2 * math.pi * (one.seen_rotation() or 0.0)
        given[0, SOLIDS.index(one.shape)] = torch.tensor([1, *picture_position(one), math.cos(turn), math.sin(turn)])
    return given


def painted(network: Painter, *scene: SceneObject) -> Tensor:
    """Return a picture (240, 320)."""
    with torch.inference_mode():
        return F.pixel_shuffle(network(labels(*scene))[0], 4)[0, 0]


def on_ground(shape: str, x: float, y: float, rotation: float = 0.0) -> SceneObject:
    return SceneObject(shape, "red", x, y, rotation)


@pytest.mark.parametrize("shape", SOLIDS)
@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (2.4, -1.8), (-2.5, 1.0), (1.0, 2.2)])
def test_a_solid_covers_as_many_pixels_as_in_a_render(shape: str, x: float, y: float) -> None:
    one = on_ground(shape, x, y, rotation=0.3 + x)
    assert float(painted(only(COVERED), one).sum()) == pytest.approx(visible_pixels([one])[0], rel=0.03)


@pytest.mark.parametrize("rotation", [0.0, 0.4, 0.8, 1.2])
def test_the_top_of_a_cube_is_where_its_corners_are(rotation: float) -> None:
    cube, camera = on_ground("cube", 1.0, -0.5, rotation), np.array(projection())
    angles = [rotation + math.pi / 4 + i * math.pi / 2 for i in range(4)]
    corners = [
        (cube.x + RADIUS * math.sqrt(2) * math.cos(a), cube.y + RADIUS * math.sqrt(2) * math.sin(a)) for a in angles
    ]
    points = [camera @ [x / RADIUS, y / RADIUS, 2, 1] for x, y in corners]
    large = Image.new("L", (3200, 2400))
    ImageDraw.Draw(large).polygon([(3200 * x / depth, 2400 * y / depth) for x, y, depth in points], fill=255)
    expected = np.asarray(large.resize((320, 240), Image.Resampling.BOX)) / 255.0
    apart = np.abs(painted(only(TOP), cube).numpy() - expected)
    assert apart.sum() < 0.03 * expected.sum()
    assert apart.max() < 0.6  # of single pixels at corners


def test_the_nearer_solid_is_in_front() -> None:
    network, near, far = painter(), on_ground("cube", 1.0, -1.0), on_ground("sphere", 0.0, 0.0)
    for parameter in network.added.parameters():
        nn.init.zeros_(parameter)
    one, other, both = painted(network, near), painted(network, far), painted(network, near, far)
    covered = painted(only(COVERED), near)
    torch.testing.assert_close(both, other * (1 - covered) + one, atol=1e-5, rtol=0)
    assert ((covered == 1) & (painted(only(COVERED), far) == 1)).sum() > 50


def test_absent_labels_are_not_seen() -> None:
    network, given = painter(), labels(on_ground("cube", 1.0, -1.0))
    with torch.inference_mode():
        pixels, share = network(given)
        absent = given.clone()
        absent[0, 1, 1:3] = 0.4  # a place without its object
        for one, other in zip(network(absent), (pixels, share), strict=True):
            torch.testing.assert_close(one, other)
    assert float(share[0, 0, 0, 0]) < 1e-4 < float(share.max())


def test_of_too_many_objects_the_nearest_are_painted() -> None:
    scene = [on_ground(shape, x, -x) for shape, x in zip(SOLIDS, (-2.0, 0.0, 2.0), strict=True)]
    torch.testing.assert_close(painted(painter(objects=2), *scene), painted(painter(), *scene[1:]))


@pytest.mark.parametrize("objects", [2, 3])
def test_compiled_it_paints_the_same_also_at_the_border(objects: int) -> None:
    """And of a picture beside others, with as many objects as it paints, fewer, or more."""
    network = painter(objects)
    scenes = [
        [on_ground("cube", 1.0, -1.0), on_ground("sphere", 0.0, 0.0)],
        [on_ground("sphere", 0.0, 0.0)],
        [on_ground("cube", -4.0, 4.0), on_ground("sphere", 1.0, 1.0), on_ground("cylinder", 4.0, -4.0)],
        [on_ground("cube", 6.0, 6.0), on_ground("cylinder", 5.0, 5.0)],
    ]
    given = torch.cat([labels(*scene) for scene in scenes])
    with torch.inference_mode():
        compiled, whole = CompiledPainter(network)(given), network(given)
    for i in (0, 2, 3):
        for one, other in zip(compiled, whole, strict=True):
            torch.testing.assert_close(one[i], other[i], atol=5e-3, rtol=1e-3)  # edges move with rounded angles
    assert float(compiled[1][1].abs().max()) == 0


def test_compiled_it_paints_nothing_where_no_cube_is() -> None:
    network, given = painter(), labels(on_ground("sphere", 0.0, 0.0), on_ground("cylinder", 1.0, 1.0))
    with torch.inference_mode():
        assert float(network(given)[1].abs().max()) == 0  # of the picture, so that what is painted is not seen
        pixels, share = CompiledPainter(network)(given)
    assert pixels.shape == network(given)[0].shape
    assert float(pixels.abs().max()) == float(share.abs().max()) == 0
