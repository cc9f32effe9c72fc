"""Enlarges a finished picture in one pass: paints each block of pixels from what a small network sees around it.

A one-step form of cascaded diffusion's super-resolution stage (Ho et al. 2022). It draws no noise, so the sampled
picture decides the result, and besides, where it sees them, the denoiser's features, labels and places. Knows no steps
and no sizes but those of its configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from pydantic import ConfigDict, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn
from torch.nn import functional as F

from shared.diffusion.object_map import ObjectMap
from shared.diffusion.unet import Conv, UNet
from shared.options import Count, Natural, NoOtherFields

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
    labels: Natural = 0  # of the denoiser, whose objects it sees in a map of their own (`object_map.py`); 0 for none
    objects: Count = 10  # that the map has at most

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the map where there is none, so that versions that know no map read the checkpoint."""
        dumped: dict[str, Any] = handler(self)
        return {key: value for key, value in dumped.items() if self.labels or key not in ("labels", "objects")}

    def model_post_init(self, _: object) -> None:
        if any(side % self.block for side in self.picture):
            raise ValueError(f"picture {list(self.picture)} must be a multiple of the block, {self.block}")


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
    """Bicubic interpolation of (N, C, h, w) to (N, C, *size)."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="bicubic", align_corners=False)


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
        x0_hat = self.p * x + self.q * prediction
        return prediction, self.upsampler(x0_hat, features=features, labels=labels)


def crop(pictures: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cut k squares of `side` pixels out of each of (N, C, H, W): (N k, C, side, side).

    corners (N, k, 2): row and column of each square's first pixel.
    """
    pairs = zip(pictures, corners.tolist(), strict=True)
    return torch.stack([one[:, y : y + side, x : x + side] for one, places in pairs for y, x in places])


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


class UpsamplerNet(nn.Module):
    """Pictures (N, C, h, w) float32 in about [-1, 1] of any size -> (N, C, H, W) float32.

    Works on blocks of pixels of the interpolated picture, since few positions with many channels are fast on a CPU.
    A pixel is a mixture of the interpolated one and of its block's colours, plus some detail: the softmax of the
    mixture draws sharp edges between even colours.
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
        self.objects = self.outlines = self.sides = None
        if config.labels:
            self.objects = ObjectMap(config.labels, config.objects)
            self.outlines = Conv(ObjectMap.channels, config.channels, 1, zero=True)
            self.sides = Conv(ObjectMap.channels, config.hidden, 1, zero=True)
        self.blocks = nn.Sequential(*(PlainBlock(config.channels, dilation) for dilation in config.dilations))
        self.widen, self.head = Conv(config.channels, config.hidden, 1), Conv(config.hidden, sum(self.parts), 1)

    def forward(
        self, x: Tensor, corners: Tensor | None = None, side: int = 0, features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Enlarge x, given the denoiser's last features and labels (N, K, 5), if the configuration has such.

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
        h = self.stem(pixels.contiguous(memory_format=torch.channels_last)) + where
        drawn = None
        if self.objects is not None and labels is not None:
            drawn = self.objects(*self._middles(labels, corners, side))
            h = h + self.outlines(drawn)
        pixels, h = (one[..., MARGIN:-MARGIN, MARGIN:-MARGIN] for one in (pixels, self.blocks(h)))
        h = self.widen(h)
        if drawn is not None:
            h = h + self.sides(drawn[..., MARGIN:-MARGIN, MARGIN:-MARGIN])
        return F.pixel_shuffle(self._painted(pixels, self.head(F.relu(h)).float()), block)

    def _middles(self, labels: Tensor, corners: Tensor | None, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels, and where rows and columns of blocks have their middles, with the margin; of each square."""
        counts = [whole // self.config.block for whole in self.picture_shape[1:]]
        sides = counts if corners is None else (side, side)
        rows, columns = (
            (torch.arange(-MARGIN, shown + MARGIN, device=labels.device) + 0.5)[None] / count
            for shown, count in zip(sides, counts, strict=True)
        )
        if corners is None:
            return labels, rows, columns
        first = corners.flatten(0, 1)  # (N k, 2)
        rows, columns = rows + first[:, :1] / counts[0], columns + first[:, 1:] / counts[1]
        return labels.repeat_interleave(corners.shape[1], 0), rows, columns

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
