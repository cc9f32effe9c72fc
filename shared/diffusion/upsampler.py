"""Enlarges a finished picture in one pass: paints each block of pixels from what a small network sees around it.

A one-step form of cascaded diffusion's super-resolution stage (Ho et al. 2022). It draws no noise, so the sampled
picture decides the result, and besides, where it sees them, the denoiser's features, labels and places. Knows no steps
and no sizes but those of its configuration.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import cache, partial
from typing import Annotated, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import exact
from shared.diffusion.object_map import ObjectMap
from shared.diffusion.unet import Conv, NetworkConfig, UNet
from shared.options import Count, Natural, NoOtherFields

AROUND: Final = 5  # blocks a side whose mean is the light in which an object's detail is drawn
DRAWN: Final = 96  # channels of the layers that draw it
# Blocks around what is enlarged, computed and dropped: beyond them are zeros, which a picture does not end in
MARGIN: Final = 2


class UpsamplerConfig(NoOtherFields):
    """Everything that fixes the upsampler's shape; saved in the checkpoint."""

    model_config = ConfigDict(frozen=True)

    picture: tuple[Count, Count]  # width and height of the finished picture
    image_channels: Count = 3
    block: Count = 4  # side in pixels of the block of the finished picture that becomes one position
    channels: Count = 64
    dilations: tuple[Count, ...] = (1, 2, 4, 1)  # of the residual blocks, each of which sees so much farther
    hidden: Count = 192  # channels before the last layer
    colours: Natural = 3  # that each block has besides the interpolated picture
    features: Natural = 0  # channels of the denoiser's last features (`UNet.features`) that it sees; 0 for none
    # Of the denoiser, whose objects it sees in a map of their own (`object_map.py`); 0 for none. Not written then, so
    # that versions which know no map read the checkpoint.
    labels: Annotated[Natural, Field(exclude_if=operator.not_)] = 0
    objects: Annotated[Count, Field(exclude_if=partial(operator.eq, 10))] = 10  # that the map has at most

    def model_post_init(self, _: object) -> None:
        if any(side % self.block for side in self.picture):
            raise ValueError(f"picture {list(self.picture)} must be a multiple of the block, {self.block}")


def maps_objects(network: NetworkConfig) -> bool:
    """Whether a denoiser takes what a map of objects is drawn from: labels, places and rotations, and nothing else."""
    return network.rotations and not network.inputs


class PlainBlock(nn.Module):
    """Conv, ReLU, conv, and the sum with the input: EDSR's block, without norm (Lim et al. 2017, sec. 3.1)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, dilation=dilation)
        self.conv2 = Conv(channels, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return out


class Enlarge(nn.Module):
    """Bicubic interpolation of (N, C, h, w) to (N, C, *size), as two products of matrices.

    OpenVINO's own takes a tenth of all the time of a picture.
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        down, across = (
            torch.from_numpy(bicubic(int(small), whole)).to(x.device)
            for small, whole in zip(x.shape[2:], self.size, strict=True)
        )
        with exact(x.device):
            enlarged: Tensor = down @ (x.float().contiguous() @ across.T)
        return enlarged


@cache
def bicubic(small: int, whole: int) -> NDArray[np.float32]:
    """Return the weights (whole, small) of bicubic interpolation along one side. As an array it is the same tensor in
    inference mode, where it is traced, and in training.
    """
    weights = F.interpolate(torch.eye(small)[None, None], (whole, small), mode="bicubic", align_corners=False)
    return np.asarray(weights[0, 0].numpy())


class OneCall(nn.Module):
    """A denoiser and an upsampler that sees its last features, as one network: from noise to the finished picture.

    (x, t, labels, keep) as `UNet` takes them -> its prediction, and the pictures (B, C, H, W) of x0_hat = p x + q
    prediction. So it samples in one step, at the timestep whose `p` and `q` these are.
    """

    def __init__(self, denoiser: UNet, upsampler: UpsamplerNet, p: float, q: float) -> None:
        super().__init__()
        self.denoiser, self.upsampler, self.p, self.q = denoiser, upsampler, p, q
        self.image_shape, self.num_labels, self.config = denoiser.image_shape, denoiser.num_labels, denoiser.config
        self.picture_shape = upsampler.picture_shape

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        features = self.denoiser.features(x, t, labels, keep)
        prediction = self.denoiser.paint(features)
        drawn = self.upsampler.draw(labels) if self.upsampler.objects is not None else None
        return prediction, self.upsampler(self.p * x + self.q * prediction, features=features, drawn=drawn)


def crop(pictures: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cut k squares of `side` pixels out of each of (N, C, H, W): (N k, C, side, side).

    corners (N, k, 2): row and column of each square's first pixel.
    """
    pairs = zip(pictures, corners.tolist(), strict=True)
    return torch.stack([one[:, y : y + side, x : x + side] for one, places in pairs for y, x in places])


def without_margin(x: Tensor) -> Tensor:
    """Return (N, C, rows, columns) of blocks without the margin around them."""
    return x[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def phases(size: Sequence[int], small: Sequence[int], block: int) -> Tensor:
    """Return where the centre of each block lies between two pixels of the small picture: (1, 4, rows, columns).

    Sine and cosine of its row, and of its column. A margin surrounds the picture.
    """
    rows, columns = (
        2 * math.pi * (torch.arange(-MARGIN, whole // block + MARGIN) + 0.5) * (block * pixels / whole)
        for whole, pixels in zip(size, small, strict=True)
    )
    waves = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([wave(angles) for angles in waves for wave in (torch.sin, torch.cos)])[None]


class Drawn(NamedTuple):
    """What the map of the objects draws, in blocks of pixels."""

    detail: Tensor  # (N, C block^2, rows, columns)
    share: Tensor  # (N, 1, rows, columns): of the picture's own detail that it replaces


class UpsamplerNet(nn.Module):
    """Pictures (N, C, h, w) float32 in about [-1, 1] of any size -> (N, C, H, W) float32.

    Works on blocks of pixels of the interpolated picture, since few positions with many channels are fast on a CPU.
    A pixel is a mixture of the interpolated one and of its block's colours, plus some detail: the softmax of the
    mixture draws sharp edges between even colours. With a map of the objects, the detail near them is first replaced by
    what the map draws: its edges are where the objects are, wherever the given picture has them.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, height = config.picture
        self.picture_shape = (config.image_channels, height, width)
        area, pixels = config.block**2, config.image_channels * config.block**2
        self.parts = [area * (1 + config.colours), config.image_channels * config.colours, pixels]
        self.enlarge: nn.Module = Enlarge((height, width))
        self.stem, self.where = Conv(pixels, config.channels), Conv(4, config.channels, 1)
        self.features = Conv(config.features, config.channels, 1) if config.features else None
        self.objects = ObjectMap(config.labels, config.objects) if config.labels else None
        if config.labels:
            self.drawn = nn.Sequential(
                Conv(ObjectMap.channels, DRAWN, 1), nn.ReLU(), Conv(DRAWN, DRAWN, 1), nn.ReLU(),
                Conv(DRAWN, pixels + 1, 1),
            )  # fmt: skip
        self.blocks = nn.Sequential(*(PlainBlock(config.channels, dilation) for dilation in config.dilations))
        self.widen, self.head = Conv(config.channels, config.hidden, 1), Conv(config.hidden, sum(self.parts), 1)

    def forward(
        self, x: Tensor, corners: Tensor | None = None, side: int = 0, features: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> Tensor:  # fmt: skip
        """Enlarge x, given the denoiser's last features and what `draw` returns, if the configuration has such.

        For training, only squares of `side` blocks, as `crop` does; corners (N, k, 2) count blocks.
        """
        if (self.features is None) != (features is None):
            raise ValueError("an upsampler takes the denoiser's features if its configuration has some, else none")
        block = self.config.block
        enlarged = F.pad(self.enlarge(x), [MARGIN * block] * 4, mode="replicate")
        small = int(x.shape[-2]), int(x.shape[-1])  # a constant where the network is traced
        where = self.where(phases(self.picture_shape[1:], small, block).to(x.device))
        if self.features is not None and features is not None:
            rows, columns = (whole // block for whole in self.picture_shape[1:])
            seen = F.interpolate(self.features(features), (rows, columns), mode="bilinear", align_corners=False)
            # in this order: OpenVINO would write the sum into the constant `where`, where the next call finds it
            where = F.pad(seen, [MARGIN] * 4, mode="replicate") + where
        if corners is not None:
            enlarged = crop(enlarged, corners * block, (side + 2 * MARGIN) * block)
            where = crop(where.expand(len(x), -1, -1, -1), corners, side + 2 * MARGIN)
        pixels = F.pixel_unshuffle(enlarged, block)
        if drawn is not None:
            pixels = self._redrawn(pixels, *drawn)
        h = self.blocks(self.stem(pixels.contiguous(memory_format=torch.channels_last)) + where)
        pixels, h = without_margin(pixels), without_margin(h)
        return F.pixel_shuffle(self._painted(pixels, self.head(F.relu(self.widen(h))).float()), block)

    def draw(self, labels: Tensor, corners: Tensor | None = None, side: int = 0) -> Drawn:
        """Draw the detail of the objects from the map alone: labels (N, K, 5), the rest as `forward` takes it."""
        counts = [whole // self.config.block for whole in self.picture_shape[1:]]
        sides = counts if corners is None else (side, side)
        rows, columns = (torch.arange(-MARGIN, shown + MARGIN, device=labels.device)[None] for shown in sides)
        if corners is not None:
            labels = labels.repeat_interleave(corners.shape[1], 0)
            first = corners.flatten(0, 1)  # (N k, 2)
            rows, columns = rows + first[:, :1], columns + first[:, 1:]
        return self.draw_blocks(labels, rows[:, :, None], columns[:, None])

    def draw_blocks(self, labels: Tensor, rows: Tensor, columns: Tensor) -> Drawn:
        """Draw the detail of the blocks in these rows and columns (N, R, C), or (N, R, 1) and (N, 1, C) for a grid."""
        assert self.objects is not None
        counts = [whole // self.config.block for whole in self.picture_shape[1:]]
        seen, near = self.objects(labels, (rows + 0.5) / counts[0], (columns + 0.5) / counts[1])
        drawn = self.drawn(seen).float()
        return Drawn(drawn[:, :-1], torch.sigmoid(near + drawn[:, -1:]))

    def _redrawn(self, pixels: Tensor, detail: Tensor, share: Tensor) -> Tensor:
        """Return blocks of pixels that have this share of this detail, in the light around."""
        N, _, rows, columns = pixels.shape
        blocks = (N, self.config.image_channels, -1, rows, columns)
        light = F.avg_pool2d(pixels.reshape(blocks).mean(2), AROUND, 1, AROUND // 2, count_include_pad=False)
        redrawn = (detail.reshape(blocks) + light[:, :, None]).reshape(pixels.shape)
        return pixels + share * (redrawn - pixels)

    def _painted(self, pixels: Tensor, h: Tensor) -> Tensor:
        """Return blocks of pixels (N, C area, rows, columns) from the interpolated ones, as the last layer says."""
        channels = self.config.image_channels
        logits, colours, detail = torch.split(h, self.parts, 1)
        N, _, rows, columns = pixels.shape
        shares = logits.reshape(N, 1 + self.config.colours, 1, -1, rows, columns).softmax(1)
        pixels = pixels.reshape(N, channels, -1, rows, columns)
        colours = (
            colours.reshape(N, self.config.colours, channels, 1, rows, columns) + pixels.mean(2, keepdim=True)[:, None]
        )
        mixed = shares[:, 0] * pixels + (shares[:, 1:] * colours).sum(1)
        return mixed.reshape(detail.shape) + detail
