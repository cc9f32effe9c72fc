"""The map of objects: what each of them changes, and where."""

import torch
from torch import Tensor, nn

from shared.diffusion.layouts import OUTSIDE
from shared.diffusion.object_map import FARTHEST, REACH, ObjectMap

ROWS, COLUMNS = ((torch.arange(n) + 0.5)[None] / n for n in (12, 16))


def made(objects: int = 3) -> ObjectMap:
    torch.manual_seed(0)
    network = ObjectMap(4, objects).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def labels(*known: tuple[int, float, float, float]) -> Tensor:
    """Return labels (1, 4, 5) of objects: index, position, and the rotation's cosine."""
    given = torch.zeros(1, 4, 5)
    given[..., 1:3] = OUTSIDE
    for index, x, y, cosine in known:
        given[0, index] = torch.tensor([1, x, y, cosine, (1 - cosine**2) ** 0.5])
    return given


def seen(network: ObjectMap, given: Tensor) -> Tensor:
    with torch.inference_mode():
        drawn: Tensor = network(given, ROWS[:, :, None], COLUMNS[:, None])[0]
    return drawn


def test_an_object_is_seen_near_its_place_and_turns_there() -> None:
    network, far = made(), FARTHEST * REACH / 2
    drawn = seen(network, labels((1, 0.2, 0.3, 1.0)))
    turned = seen(network, labels((1, 0.2, 0.3, -1.0)))
    assert drawn.shape == (1, ObjectMap.channels, 12, 16)
    apart = (COLUMNS[0] - 0.2).square() + (ROWS[0, :, None] - 0.3).square()
    assert drawn[..., apart > far**2].abs().max() < 1e-3 < drawn[..., apart < REACH**2].abs().amax(1).min()
    assert (drawn - turned)[..., apart < REACH**2].abs().max() > 0.05


def test_single_points_are_those_of_a_grid() -> None:
    network, given = made(), labels((1, 0.2, 0.3, 1.0), (3, 0.5, 0.4, 0.0))
    rows, columns = torch.tensor([[3, 5, 0]]), torch.tensor([[2, 7, 15]])
    with torch.inference_mode():
        points, near = network(given, ROWS[:, rows[0], None], COLUMNS[:, columns[0], None])
    assert near.shape == (1, 1, 3, 1)
    torch.testing.assert_close(points[..., 0], seen(network, given)[:, :, rows[0], columns[0]])


def test_absent_labels_and_unknown_places_are_not_seen() -> None:
    network, one = made(), labels((1, 0.2, 0.3, 1.0))
    absent = one.clone()
    absent[0, 2, 1:3] = 0.2  # a place without its object
    torch.testing.assert_close(seen(network, absent), seen(network, one))
    unknown = one.clone()
    unknown[0, 2, 0] = 1
    torch.testing.assert_close(seen(network, unknown), seen(network, one), atol=1e-3, rtol=0)


def test_of_too_many_objects_the_first_labels_are_seen() -> None:
    objects = [(i, 0.2 + 0.2 * i, 0.5, 0.0) for i in range(4)]
    network = made(objects=3)
    torch.testing.assert_close(seen(network, labels(*objects)), seen(network, labels(*objects[:3])))
    assert (seen(made(objects=4), labels(*objects)) - seen(network, labels(*objects))).abs().max() > 0.05


def test_overlapping_objects_share_what_is_seen() -> None:
    network = made()
    alone = [seen(network, labels((i, 0.5, 0.5, 0.0))) for i in (0, 1)]
    both = seen(network, labels((0, 0.5, 0.5, 0.0), (1, 0.5, 0.5, 0.0)))
    middle = both[..., 6, 8]
    low, high = torch.minimum(*alone)[..., 6, 8], torch.maximum(*alone)[..., 6, 8]
    assert ((middle >= low - 0.05) & (middle <= high + 0.05)).all()
