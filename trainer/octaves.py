"""The power of pictures in each octave of spatial frequency: shows blur and noise that scores do not see."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F


def octave_power(pictures: Tensor) -> Tensor:
    """Return the mean power of pictures (N, C, H, W) in each octave, the finest first: (octaves,) float32.

    The first octave has periods of less than 4 pixels, the next 4 to 8, and so on, up to half of the shorter side. A
    Hann window keeps the step between opposite borders out of the fine octaves.
    """
    height, width = pictures.shape[-2:]
    x = pictures.float()
    x = x - x.mean((-2, -1), keepdim=True)
    window = torch.outer(*(torch.hann_window(side, periodic=False, device=x.device) for side in (height, width)))
    power = torch.fft.fft2(x * window).abs().square().mean((0, 1))  # (H, W)
    octave = _octave_of(height, width).to(x.device)
    count = int(math.log2(min(height, width))) - 1
    return torch.stack([power[octave == k].sum() for k in range(count)])


def without_dots(pictures: Tensor) -> Tensor:
    """Limit each value of (N, C, H, W) to the range of its eight neighbours' values: edges stay, single dots vanish.

    A network that is to reach a power may put dots along edges instead of sharpening them.
    """
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    around = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    return pictures.clamp(reduce(torch.minimum, around), reduce(torch.maximum, around))


def _octave_of(height: int, width: int) -> Tensor:
    """Return the octave of each coefficient of `fft2`: (H, W) int64, 0 the finest."""
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    period = (y.square() + x.square()).clamp(min=1e-12).rsqrt()
    octave: Tensor = period.log2().ceil().sub(2).clamp(min=0).long()
    return octave
