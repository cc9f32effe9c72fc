"""Compares the small patches of two pictures window by window: rewards an edge that is as sharp as the original's.

An absolute error is least where an edge of uncertain place is blurred. The distance here only asks that a window has
the same patches, wherever in it they are, so blur costs, and so do dots that the original does not have.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

PATCH: Final = 3  # side in pixels
WINDOW: Final = 16  # side in pixels
DIRECTIONS: Final = 2  # drawn with each picture; all pictures of a step are compared along all of them
SCALES: Final = (1, 2)  # pictures are also compared at half their size, where a patch covers twice as much


def random_directions(pictures: int, generator: torch.Generator) -> Tensor:
    """Draw unit vectors in the space of patches (pictures, DIRECTIONS, 3, PATCH, PATCH), blind to mean colours.

    They respond to edges and texture alone. With mean colours, shifting an edge would cost as much as blur.
    """
    drawn = torch.randn(pictures, DIRECTIONS, 3, PATCH, PATCH, generator=generator)
    drawn -= drawn.mean((-2, -1), keepdim=True)
    directions: Tensor = drawn / drawn.flatten(2).norm(dim=2)[..., None, None, None]
    return directions


def sliced_distance(made: Tensor, target: Tensor, directions: Tensor) -> Tensor:
    """Return the mean sliced Wasserstein distance between the patches of the same windows of two (N, 3, H, W): ().

    directions: (D, 3, PATCH, PATCH). Along each, the distance between two sets of patches is that of their sorted
    projections (Heitz et al. 2021, eq. 4, where a set is a whole feature map). Zeros surround the pictures.
    """
    distances = []
    for scale in SCALES:
        projected = F.conv2d(F.avg_pool2d(torch.cat([made, target]), scale), directions, padding=PATCH // 2)
        side = min(WINDOW // scale, *projected.shape[-2:])
        windows = projected.unfold(2, side, side).unfold(3, side, side).flatten(-2)  # (2 N, D, h, w, side ** 2)
        ours, theirs = windows.sort().values.chunk(2)
        distances.append((ours - theirs).abs().mean())
    return torch.stack(distances).mean()
