"""A discriminator of small squares of pictures, and the losses by which an upsampler learns against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from shared.device import exact
from shared.diffusion.unet import Conv
from shared.diffusion.upsampler import UpsamplerConfig, UpsamplerNet

DETAIL = ((3, 15.0), (9, 5.0))  # of an upsampler's discriminator: see `Discriminator`
PENALTY = 0.1  # weight of what more noise changes in the scores
SLOPE = 0.2  # of its activations, for negative values


def detail_of(x: Tensor, side: int) -> Tensor:
    """Return what differs from the mean of `side` pixels a side around each of x (N, C, H, W), fewer at the border.

    The means are two matrix products: pooling with large windows takes a CPU ten times as long. Not in bfloat16, which
    would round them by up to a level of 256.
    """
    rows, columns = (_neighbours(size, side // 2, x) for size in x.shape[-2:])
    with exact(x.device):
        return x - rows @ (x.contiguous() @ columns.T)


def _neighbours(size: int, most: int, like: Tensor) -> Tensor:
    """Return the matrix (size, size) that takes the mean of up to `most` neighbours to each side."""
    index = torch.arange(size, device=like.device)
    near = ((index[:, None] - index).abs() <= most).to(like.dtype)
    return near / near.sum(1, keepdim=True)


class Discriminator(nn.Module):
    """Squares (N, C, side, side) of pictures -> a score of each (N,).

    It sees detail alone, enhanced. The rest is the pixel loss's, and would hide the little in which edges differ.
    `detail`: pixels a side whose mean is no detail, and a gain, for each view of a square; a side of 0 is the square
    itself.
    """

    def __init__(
        self, image_channels: int = 3, width: int = 32, detail: Sequence[tuple[int, float]] = DETAIL
    ) -> None:  # fmt: skip
        super().__init__()
        self.detail = detail
        sizes = ((4 * len(detail) * image_channels, width, 1), (width, 2 * width, 2), (2 * width, 3 * width, 2))
        layers: list[nn.Module] = []
        for c_in, c_out, stride in (*sizes, (3 * width, 3 * width, 1)):
            layers += [conv := Conv(c_in, c_out, stride=stride), nn.LeakyReLU(SLOPE)]
            nn.init.kaiming_normal_(conv.weight, SLOPE)
        self.layers = nn.Sequential(*layers, Conv(3 * width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        detail = torch.cat([gain * (detail_of(x, side) if side else x) for side, gain in self.detail], 1)
        h = F.pixel_unshuffle(detail, 2).contiguous(memory_format=torch.channels_last)
        scores: Tensor = self.layers(h).float().mean((1, 2, 3))
        return scores


class Compared(NamedTuple):
    """The losses of both sides."""

    adversarial: Tensor  # of what is made
    discriminating: Tensor  # of the discriminator


class Adversaries(nn.Module):
    """An upsampler and the discriminator that it learns against. Both learn from one loss, which neither can cheat."""

    def __init__(self, upsampler: UpsamplerNet) -> None:
        super().__init__()
        self.upsampler, self.discriminator = upsampler, Discriminator(upsampler.config.image_channels)

    @property
    def config(self) -> UpsamplerConfig:
        return self.upsampler.config

    def forward(
        self, x: Tensor, corners: Tensor, side: int, real: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the upsampler's squares, its adversarial loss, and the discriminator's loss.

        real (n, C, s, s): the originals' squares. noise (2, n, C, s, s): added to both. The loss is relativistic: a
        square is compared with its original (Jolicoeur-Martineau 2018, as in Huang et al. 2024, "R3GAN").
        """
        made = self.upsampler.squares(x, corners, side)
        return made, *compare(self.discriminator, real, made, noise)


def compare(
    discriminator: Discriminator, real: Tensor, made: Tensor, noise: Tensor, moved: Tensor | None = None
) -> Compared:  # fmt: skip
    """Return the relativistic losses of what is `made`, and of the discriminator. See `Adversaries.forward`.

    `moved`: more noise (2, n, C, s, s), which should not change the scores. That change, squared, stands for their
    gradients' size (Lin et al. 2025, "APT", eq. 7), by which R3GAN keeps the discriminator smooth.
    """
    both = torch.stack([real, made.detach()]) + noise
    scores = discriminator(both.flatten(0, 1))
    of_real, of_fake = scores.chunk(2)
    fixed = {name: value.detach() for name, value in discriminator.named_parameters()}
    of_made = functional_call(discriminator, fixed, (made + noise[1],))
    discriminating = F.softplus(of_fake - of_real).mean()
    if moved is not None:
        change = discriminator((both + moved).flatten(0, 1)) - scores
        discriminating = discriminating + PENALTY * change.square().mean()
    return Compared(F.softplus(of_real.detach() - of_made).mean(), discriminating)
