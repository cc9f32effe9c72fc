"""How far apart the detail of two sets of pictures is, whatever stands where: the sliced Wasserstein distance.

An adversarial loss gives a picture edges that lie elsewhere than its original's, so a distance between pixels rises
while pictures improve. This one compares distributions of small patches in each octave (Karras et al. 2018, sec. 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

PATCH: Final = 7  # pixels a side
PATCHES: Final = 128  # of each picture, in each octave
DIRECTIONS: Final = 128  # on which patches are projected
SMALLEST: Final = 16  # shorter side of the last octave, which also holds light and colours


def sliced_distance(made: Tensor, real: Tensor) -> float:
    """Return the sliced Wasserstein distance of patches of pictures (N, C, H, W), the mean over octaves.

    In each octave it is the mean over random directions of the Wasserstein-1 distance between the projected patches,
    which for sorted values is their mean difference (Rabin et al. 2011, eq. 12). It is 0 for equal sets; 1 is the
    deviation of what is `real`: unlike there, both sets are divided by that one, so that missing detail counts. Patches
    and directions are the same at each call, and both sets' patches lie in the same places.
    """
    generator = torch.Generator().manual_seed(0)
    distances = []
    for own, wanted in zip(octaves(made.float()), octaves(real.float()), strict=True):
        side = min(PATCH, *own.shape[-2:])
        rows, columns = (
            torch.randint(size - side + 1, (len(own), PATCHES), generator=generator) for size in own.shape[-2:]
        )
        directions = torch.randn(own.shape[1] * side * side, DIRECTIONS, generator=generator)
        directions = directions / directions.norm(dim=0)
        projected = [_sorted(one, rows, columns, side, directions) for one in (own, wanted)]
        apart = projected[0] - projected[1]
        deviation = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
        distances.append(float(apart.abs().mean() / deviation.clamp(min=1e-6)))
    return sum(distances) / len(distances)


def octaves(x: Tensor) -> Iterator[Tensor]:
    """Yield what each octave of pictures adds to the next coarser one, and the last (Burt & Adelson 1983)."""
    while min(x.shape[-2:]) >= 2 * SMALLEST:
        coarser = F.avg_pool2d(x, 2)
        yield x - F.interpolate(coarser, x.shape[-2:], mode="bilinear", align_corners=False)
        x = coarser
    yield x


def _sorted(pictures: Tensor, rows: Tensor, columns: Tensor, side: int, directions: Tensor) -> Tensor:
    """Return the sorted projections (N PATCHES, DIRECTIONS) of the patches with these first rows and columns."""
    patches = pictures.unfold(2, side, 1).unfold(3, side, 1)  # (N, C, rows, columns, side, side)
    which = torch.arange(len(pictures))[:, None]
    chosen = patches[which, :, rows, columns]  # (N, PATCHES, C, side, side)
    return (chosen.flatten(0, 1).flatten(1) @ directions).sort(dim=0).values
