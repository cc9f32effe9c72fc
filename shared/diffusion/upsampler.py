"""Enlarges a finished picture in one pass: bicubic interpolation plus what a small network adds to it.

A one-step form of cascaded diffusion's super-resolution stage (Ho et al. 2022): a regression, so it draws no noise and
the sampled picture alone decides the result. Knows no labels, no steps and no sizes but those of its configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from shared.diffusion.unet import Conv
from shared.options import Count, Natural, NoOtherFields


class UpsamplerConfig(NoOtherFields):
    """Everything that fixes the upsampler's shape; saved in the checkpoint."""

    model_config = ConfigDict(frozen=True)

    picture: tuple[Count, Count]  # width and height of the finished picture
    image_channels: Count = 3
    block: Count = 4  # side in pixels of the block of the finished picture that becomes one position
    channels: Count = 48
    blocks: Natural = 4

    def model_post_init(self, _: object) -> None:
        if any(side % self.block for side in self.picture):
            raise ValueError(f"picture {list(self.picture)} must be a multiple of the block, {self.block}")


class PlainBlock(nn.Module):
    """Conv, ReLU, conv, and the sum with the input: EDSR's block, without norm (Lim et al. 2017, sec. 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv(channels, channels), Conv(channels, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return out


class Enlarge(nn.Module):
    """Bicubic interpolation of (N, C, h, w) to (N, C, *size)."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="bicubic", align_corners=False)


def crop(pictures: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cut k squares of `side` pixels out of each of (N, C, H, W): (N k, C, side, side).

    corners (N, k, 2): row and column of each square's first pixel.
    """
    pairs = zip(pictures, corners.tolist(), strict=True)
    return torch.stack([one[:, y : y + side, x : x + side] for one, places in pairs for y, x in places])


class UpsamplerNet(nn.Module):
    """Pictures (N, C, h, w) float32 in about [-1, 1] of any size -> (N, C, H, W) float32.

    Works on blocks of pixels of the interpolated picture, since few positions with many channels are fast on a CPU.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, height = config.picture
        self.picture_shape = (config.image_channels, height, width)
        pixels = config.image_channels * config.block**2
        self.enlarge: nn.Module = Enlarge((height, width))
        self.stem = Conv(pixels, config.channels)
        self.blocks = nn.Sequential(*(PlainBlock(config.channels) for _ in range(config.blocks)))
        self.head = Conv(config.channels, pixels, zero=True)

    def forward(self, x: Tensor, corners: Tensor | None = None, side: int = 0) -> Tensor:
        """Enlarge x. For training, only squares of `side` blocks, as `crop` does; corners (N, k, 2) count blocks."""
        enlarged: Tensor = self.enlarge(x)
        if corners is not None:
            enlarged = crop(enlarged, corners * self.config.block, side * self.config.block)
        h = F.pixel_unshuffle(enlarged, self.config.block)
        h = self.head(self.blocks(self.stem(h.contiguous(memory_format=torch.channels_last))))
        return enlarged + F.pixel_shuffle(h.float(), self.config.block)
