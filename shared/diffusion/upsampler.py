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
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import exact
from shared.diffusion.solids import Camera, Painter, Solid
from shared.diffusion.unet import Conv, NetworkConfig, UNet
from shared.diffusion.windows import ObjectWindows, WindowsConfig
from shared.options import Count, Natural, NoOtherFields

Interpolation = Literal["bilinear", "bicubic"]

AROUND: Final = 5  # blocks a side whose mean is the light in which an object is painted
LEAST: Final = 0.02  # weight of an edge's block in that mean
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
    # Draws each object in a window of its own (`windows.py`), which pixels may be taken from; None: no such windows
    windows: Annotated[WindowsConfig | None, Field(exclude_if=operator.not_)] = None
    # What each of the denoiser's labels is, if it paints them (`solids.py`), as seen by this camera. Not written if it
    # does not, so that versions which cannot read the checkpoint.
    solids: Annotated[tuple[Solid, ...], Field(exclude_if=operator.not_)] = ()
    camera: Annotated[Camera | None, Field(exclude_if=operator.not_)] = None
    objects: Annotated[Count, Field(exclude_if=partial(operator.eq, 10))] = 10  # that it paints at most

    def model_post_init(self, _: object) -> None:
        if any(side % self.block for side in self.picture):
            raise ValueError(f"picture {list(self.picture)} must be a multiple of the block, {self.block}")
        if bool(self.solids) != (self.camera is not None):
            raise ValueError("solids need a camera, and it is of no use without them")
        if self.solids and self.windows:
            raise ValueError("an upsampler draws objects in windows or paints solids, not both")


def draws_objects(network: NetworkConfig) -> bool:
    """Whether a denoiser takes what objects are drawn by: labels, places and rotations, and nothing else."""
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


def enlarge(x: Tensor, size: Sequence[int], mode: Interpolation = "bicubic") -> Tensor:
    """Interpolate (N, C, h, w) to (N, C, *size), as two products of matrices.

    OpenVINO's own bicubic interpolation takes a tenth of all the time of a picture, its bilinear one a twentieth.
    """
    down, across = (
        torch.from_numpy(interpolation(int(small), int(whole), mode)).to(x.device)
        for small, whole in zip(x.shape[2:], size, strict=True)
    )
    with exact(x.device):
        enlarged: Tensor = down @ (x.float().contiguous() @ across.T)
    return enlarged


@cache
def interpolation(small: int, whole: int, mode: Interpolation) -> NDArray[np.float32]:
    """Return the weights (whole, small) of interpolation along one side. As an array it is the same tensor in inference
    mode, where it is traced, and in training.
    """
    weights = F.interpolate(torch.eye(small)[None, None], (whole, small), mode=mode, align_corners=False)
    return np.asarray(weights[0, 0].numpy())


class OneCall(nn.Module):
    """A denoiser and an upsampler that sees its last features, as one network: from noise to the finished picture.

    (x, t, labels, keep) as `UNet` takes them -> its prediction, and the pictures (B, C, H, W) of x0_hat = p x + q
    prediction. So it samples in one step, at the timestep whose `p` and `q` these are. What the upsampler
    draws by these labels may be given.
    """

    def __init__(self, denoiser: UNet, upsampler: UpsamplerNet, p: float, q: float) -> None:
        super().__init__()
        self.denoiser, self.upsampler, self.p, self.q = denoiser, upsampler, p, q
        self.image_shape, self.num_labels, self.config = denoiser.image_shape, denoiser.num_labels, denoiser.config
        self.picture_shape = upsampler.picture_shape

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor, *drawn: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        prediction, *small = self.predict(x, *self.denoiser.trunk(x, t, labels, keep))
        return prediction, self.enlarge(*small, *(drawn or self.upsampler.draw(labels) or ()))

    def predict(self, x: Tensor, *trunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prediction, x0_hat and the features, by what the denoiser's `trunk` returns.

        In float32 everywhere: rounded to bfloat16, these layers give small pictures away (docs/dev/decisions.md).
        """
        with exact(x.device):
            features = self.denoiser.last_level(*(one.float() for one in trunk))
            prediction = self.denoiser.paint(features)
            return prediction, self.p * x + self.q * prediction, features

    def enlarge(self, x0_hat: Tensor, features: Tensor, *drawn: Tensor | None) -> Tensor:
        """Return the finished pictures."""
        pixels, share = (*drawn, None, None)[:2]
        enlarged: Tensor = self.upsampler(x0_hat, features, None if pixels is None else Drawn(pixels, share))
        return enlarged


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
    """What is drawn of a picture's objects, in blocks of pixels with a margin."""

    pixels: Tensor  # (N, C block^2, rows, columns)
    share: Tensor | None  # (N, 1, rows, columns): how much of the picture they replace, if it says so


def without_light(blocks: Tensor, channels: int, weights: Tensor | None = None) -> Tensor:
    """Subtract from blocks of pixels (N, channels area, rows, columns) the mean around each, linear between blocks.

    weights (N, 1, rows, columns): of the blocks in these means; all the same by default.
    """
    N, size, rows, columns = blocks.shape
    side = math.isqrt(size // channels)
    means = blocks.reshape(N, channels, -1, rows, columns).mean(2)
    if weights is None:
        means = F.avg_pool2d(means, AROUND, 1, AROUND // 2, count_include_pad=False)
    else:
        sums, counts = (F.avg_pool2d(one, AROUND, 1, AROUND // 2) for one in (weights * means, weights))
        means = sums / counts
    light = enlarge(means, (rows * side, columns * side), "bilinear")
    return blocks - F.pixel_unshuffle(light, side)


class UpsamplerNet(nn.Module):
    """Pictures (N, C, h, w) float32 in about [-1, 1] of any size -> (N, C, H, W) float32.

    Works on blocks of pixels of the interpolated picture, since few positions with many channels are fast on a CPU.
    A pixel is a mixture of the interpolated one and of its block's colours, plus some detail: the softmax of the
    mixture draws sharp edges between even colours. With a painter, edges of cubes are what it paints, in the light of
    the given picture: they are where they belong, wherever that has them.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, height = config.picture
        self.picture_shape = (config.image_channels, height, width)
        area, pixels = config.block**2, config.image_channels * config.block**2
        self.sources = 2 if config.windows else 1  # pictures that a pixel may be taken from
        self.parts = [area * (self.sources + config.colours), config.image_channels * config.colours, pixels]
        self.stem, self.where = Conv(self.sources * pixels, config.channels), Conv(4, config.channels, 1)
        self.features = Conv(config.features, config.channels, 1) if config.features else None
        size, channels = (height, width), config.image_channels
        self.painter = self.windows = None
        if config.camera is not None:
            self.painter = Painter(config.solids, config.camera, size, config.block, channels, config.objects, MARGIN)
        if config.windows is not None:
            self.windows = ObjectWindows(config.windows, size, config.block, channels, MARGIN)
        self.blocks = nn.Sequential(*(PlainBlock(config.channels, dilation) for dilation in config.dilations))
        self.widen, self.head = Conv(config.channels, config.hidden, 1), Conv(config.hidden, sum(self.parts), 1)
        self.retouch = Conv(config.hidden, pixels, 1, zero=True) if config.solids else None

    def forward(self, x: Tensor, features: Tensor | None = None, drawn: Drawn | None = None) -> Tensor:
        """Enlarge x, given the denoiser's last features and what `draw` returns, if the configuration has such."""
        return self.mix(self.seen(x, features, drawn))

    def squares(
        self, x: Tensor, corners: Tensor, side: int, features: Tensor | None = None, drawn: Drawn | None = None
    ) -> Tensor:  # fmt: skip
        """Return squares of `side` blocks of what `forward` returns, as `crop` does; corners (N, k, 2) count blocks."""
        seen, n = self.seen(x, features, drawn), len(x)
        cut = partial(crop, corners=corners, side=side + 2 * MARGIN)
        return self.mix([None if one is None else cut(one.expand(n, *one.shape[1:])) for one in seen])

    def seen(self, x: Tensor, features: Tensor | None, drawn: Drawn | None) -> list[Tensor | None]:
        """Return what is seen of whole pictures, in blocks with a margin: interpolated pixels, where they are and what
        the denoiser's features say of them, and pixels and shares of what is drawn, in the light of the picture.
        """
        if (self.features is None) != (features is None):
            raise ValueError("an upsampler takes the denoiser's features if its configuration has some, else none")
        block, channels = self.config.block, self.config.image_channels
        enlarged = F.pad(enlarge(x, self.picture_shape[1:]), [MARGIN * block] * 4, mode="replicate")
        small = int(x.shape[-2]), int(x.shape[-1])  # a constant where the network is traced
        where = self.where(phases(self.picture_shape[1:], small, block).to(x.device))
        if self.features is not None and features is not None:
            rows, columns = (whole // block for whole in self.picture_shape[1:])
            seen = F.interpolate(self.features(features), (rows, columns), mode="bilinear", align_corners=False)
            # in this order: OpenVINO would write the sum into the constant `where`, where the next call finds it
            where = F.pad(seen, [MARGIN] * 4, mode="replicate") + where
        pixels = F.pixel_unshuffle(enlarged, block)
        if drawn is None:
            return [pixels, where, None, None]
        # away from edges alone, if it says where these are: they may be elsewhere in the given picture
        away = None if drawn.share is None else 1 + LEAST - drawn.share
        lit = pixels + without_light(drawn.pixels - pixels, channels, away)
        return [pixels, where, lit, drawn.share]

    def mix(self, seen: Sequence[Tensor | None]) -> Tensor:
        """Return pictures, without the margin, from what is seen of them."""
        pixels, where, lit, share = seen
        assert pixels is not None
        assert where is not None
        sources = [pixels] if lit is None or share is not None else [pixels, lit]
        h = torch.cat(sources, 1).contiguous(memory_format=torch.channels_last)
        h = without_margin(self.blocks(self.stem(h) + where))
        h = F.relu(self.widen(h))
        made = self._mixed([without_margin(one) for one in sources], self.head(h).float())
        if lit is not None and share is not None and self.retouch is not None:
            made = torch.lerp(made, without_margin(lit) + self.retouch(h).float(), without_margin(share))
        return F.pixel_shuffle(made, self.config.block)

    def draw(self, labels: Tensor) -> Drawn | None:
        """Draw the objects of whole pictures by labels (N, K, 5) alone, if it does so."""
        with exact(labels.device):
            if self.windows is not None:
                return Drawn(self.windows(labels), None)
            return None if self.painter is None else Drawn(*self.painter(labels))

    def _mixed(self, sources: Sequence[Tensor], h: Tensor) -> Tensor:
        """Return blocks of pixels (N, C area, rows, columns) from those of each source, as the last layer says."""
        channels = self.config.image_channels
        logits, colours, detail = torch.split(h, self.parts, 1)
        N, _, rows, columns = sources[0].shape
        shares = logits.reshape(N, len(sources) + self.config.colours, 1, -1, rows, columns).softmax(1)
        blocks = [one.reshape(N, channels, -1, rows, columns) for one in sources]
        colours = (
            colours.reshape(N, self.config.colours, channels, 1, rows, columns)
            + blocks[0].mean(2, keepdim=True)[:, None]
        )
        mixed = (shares[:, len(blocks) :] * colours).sum(1)
        for k, own in enumerate(blocks):
            mixed = mixed + shares[:, k] * own
        return mixed.reshape(detail.shape) + detail
