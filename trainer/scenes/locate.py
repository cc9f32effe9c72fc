"""Where objects stand, found in the pictures themselves: positions.json for a data set that comes without one.

i-CLEVR's pictures are turns of one scene (El-Nouby et al. 2019): NAME_0.png shows an object, NAME_1.png the same one
and another, and so on. So what differs between two of them is the new object. Nothing is learned for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from trainer.errors import TrainerError

SIZE = 64  # side of the squares that are compared, in pixels
BLUR = 2.5  # standard deviation in pixels: an object is larger, noise and edges are smaller
NEAR = 0.15  # of the side: how far an object reaches from where the pictures differ most
CHUNK = 1024  # pictures compared at once

OfScene = dict[tuple[str, frozenset[str]], list[str]]  # scene and labels -> its pictures with these labels
Positions = dict[str, list[tuple[float, float]]]  # picture -> where the object of each label is, as in positions.json


def locate(train: Mapping[str, list[str]], images: Tensor) -> Positions:
    """Positions of every picture of train.json, whose pictures are `images` (N, 3, S, S) uint8 in that order.

    A picture with several labels is compared with that picture of its scene, named alike up to the last "_", which has
    all of these labels but one; TrainerError where there is none, or where two have the same labels. One with a single
    label is compared with the median of all such pictures.
    """
    index = {name: i for i, name in enumerate(train)}
    of_scene: OfScene = {}
    for name, labels in train.items():
        of_scene.setdefault((_scene(name), frozenset(labels)), []).append(name)
    alone = [name for name, labels in train.items() if len(labels) == 1]
    found: Positions = {}
    if alone:
        pictures = images[[index[name] for name in alone]].float()
        # Where they vary as a set counts too: if all have their object at one place, the median shows one there itself.
        differences = (pictures - pictures.median(0).values).abs().mean(1) + pictures.std(0, correction=0).mean(0)
        found.update((name, [point]) for name, point in zip(alone, _centres(differences), strict=True))
    several = sorted((name for name in train if len(train[name]) > 1), key=lambda name: len(train[name]))
    before = [_before(name, train[name], of_scene) for name in several]
    for first in range(0, len(several), CHUNK):
        names, earlier = several[first : first + CHUNK], before[first : first + CHUNK]
        now, then = (images[[index[name] for name in side]].float() for side in (names, earlier))
        points = _centres((now - then).abs().mean(1))
        for name, known, point in zip(names, earlier, points, strict=True):
            where = dict(zip(train[known], found[known], strict=True))
            found[name] = [where.get(label, point) for label in train[name]]
    return {name: found[name] for name in train}


def _scene(name: str) -> str:
    return name.rpartition("_")[0] or name


def _before(name: str, labels: list[str], of_scene: OfScene) -> str:
    """The picture of the same scene with all of these labels but one."""
    for label in reversed(labels):
        if earlier := of_scene.get((_scene(name), frozenset(labels) - {label})):
            if len(earlier) > 1:
                raise TrainerError(
                    f'"{earlier[0]}" and "{earlier[1]}" would be of the scene of "{name}" and have the same labels; '
                    'name the pictures of one scene alike up to the last "_", and no others'
                )
            return earlier[0]
    raise TrainerError(
        f'"{name}": no picture of its scene has all of its labels but one, so none says what is new in it'
    )


def _centres(differences: Tensor) -> list[tuple[float, float]]:
    """(N, S, S) -> the middle of each one's largest blot, as [x, y] in fractions of the side."""
    n, side, _ = differences.shape
    blurred = gaussian_blur(differences[:, None], [13, 13], [BLUR, BLUR])[:, 0]
    axis = (torch.arange(side) + 0.5) / side
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (S, S, 2)
    most, at = blurred.flatten(1).max(1)
    reach = (grid - grid.view(-1, 2)[at].view(n, 1, 1, 2)).norm(dim=-1)
    weight = blurred * ((blurred > most.view(n, 1, 1) / 2) & (reach < NEAR))
    middle = torch.einsum("nhw,hwc->nc", weight, grid) / weight.sum((1, 2))[:, None]
    # Two pictures without a difference have no blot: the centre of the picture.
    middle = middle.nan_to_num(0.5)
    return [(round(float(x), 4), round(float(y), 4)) for x, y in middle]
