"""Finds objects in pictures, for the positions.json of a data set that has none. Learns nothing.

i-CLEVR adds objects to a scene one by one (El-Nouby et al. 2019): NAME_0.png shows one object, NAME_1.png the same one
and another, and so on. The difference of two such pictures is the new object.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from trainer.errors import TrainerError

SIZE = 64  # side of the squares that are compared, in pixels
LIGHT_BLUR, LIGHT_KERNEL = 10.0, 41  # pixels of 64: much wider than an object
BLUR = 2.5  # standard deviation in pixels, between the size of an object and that of noise and edges
NEAR = 0.15  # how far an object extends from the largest difference, in fractions of the side
CHUNK = 1024  # pictures compared at once

Positions = dict[str, list[tuple[float, float]]]  # picture -> the position of each label, as in positions.json


def locate(train: Mapping[str, list[str]], images: Tensor) -> Positions:
    """Return the positions in every picture of train.json; `images` (N, 3, S, S) uint8 are the pictures in its order.

    A picture with several labels is compared with the picture of its scene that has all of these labels but one. A
    scene's pictures have the same name up to the last "_". A picture with one label is compared with the median of all
    such pictures.
    """
    index = {name: i for i, name in enumerate(train)}
    of_scene: dict[tuple[str, frozenset[str]], list[str]] = {}
    for name, labels in train.items():
        of_scene.setdefault((_scene(name), frozenset(labels)), []).append(name)
    alone = [name for name, labels in train.items() if len(labels) == 1]
    found: Positions = {}
    if alone:
        pictures = images[[index[name] for name in alone]].float()
        # Add the deviation over all pictures: where they all have an object in one place, the median shows one there.
        different = pictures - pictures.median(0).values
        # without what changes slowly over the picture: the light, as lamps stand elsewhere in every scene
        different -= gaussian_blur(different, [LIGHT_KERNEL, LIGHT_KERNEL], [LIGHT_BLUR, LIGHT_BLUR])
        differences = different.abs().mean(1) + pictures.std(0, correction=0).mean(0)
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
    return {name: found.get(name, []) for name in train}


def _scene(name: str) -> str:
    return name.rpartition("_")[0] or name


def _before(name: str, labels: list[str], of_scene: Mapping[tuple[str, frozenset[str]], list[str]]) -> str:
    """Return the picture of the same scene with all of these labels but one."""
    for label in reversed(labels):
        if earlier := of_scene.get((_scene(name), frozenset(labels) - {label})):
            if len(earlier) > 1:
                raise TrainerError(
                    f'"{earlier[0]}" and "{earlier[1]}" have the same labels and are named as pictures of the scene of '
                    f'"{name}"; give only the pictures of one scene the same name up to the last "_"'
                )
            return earlier[0]
    raise TrainerError(
        f'"{name}": no picture of its scene has all of its labels but one, so its new object cannot be found'
    )


def _centres(differences: Tensor) -> list[tuple[float, float]]:
    """Return the centre of the largest blot in each of (N, S, S), as [x, y] in fractions of the side."""
    n, side, _ = differences.shape
    blurred = gaussian_blur(differences[:, None], [13, 13], [BLUR, BLUR])[:, 0]
    axis = (torch.arange(side) + 0.5) / side
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (S, S, 2)
    most, at = blurred.flatten(1).max(1)
    reach = (grid - grid.view(-1, 2)[at].view(n, 1, 1, 2)).norm(dim=-1)
    weight = blurred * ((blurred > most.view(n, 1, 1) / 2) & (reach < NEAR))
    middle = torch.einsum("nhw,hwc->nc", weight, grid) / weight.sum((1, 2))[:, None]
    middle = middle.nan_to_num(0.5)  # without any difference: the centre of the picture
    return [(round(float(x), 4), round(float(y), 4)) for x, y in middle]
