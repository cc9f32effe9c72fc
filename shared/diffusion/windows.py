"""Draws each object of a picture in a window of its own: an upsampler takes sharp edges from it.

What an object looks like is learnt, from its label, place and rotation alone: no camera, and no names of solids. A
network that sees these (a hypernetwork, Ha et al. 2016) returns a few conics for each object. Each pixel of the window
sees on which side of them it lies, and how far inside; a second network says from that what the pixel shows, and how
much of it the object covers (as BSP-Net, Chen et al. 2020, composes half-spaces). Lines and ellipses are conics, so an
edge may be misplaced but never wavy.
Windows are laid over each other, the lowest in the picture last: objects stand on a ground that is seen from above.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, NamedTuple

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import initial_weights
from shared.options import Count, NoOtherFields

CONIC: Final = 6  # weights of 1, u, v, u^2, u v and v^2
UNIT: Final = 16.0  # pixels that are 1 in u and v
POSE: Final = 11  # numbers of `pose`


class WindowsConfig(NoOtherFields):
    """Everything that fixes the shape of `ObjectWindows`; part of the upsampler's configuration."""

    model_config = ConfigDict(frozen=True)

    labels: Count
    side: Annotated[float, Field(gt=0, le=1)] = 0.28  # of a window, in widths of the picture
    objects: Count = 10  # of a picture, at most; of more, the farthest have no window
    curves: Count = 20
    hidden: Count = 32  # of the network that sees the curves, at each pixel
    width: Count = 192  # of the network that draws the curves, once for each object


class Windows(NamedTuple):
    """Objects, each in a window of W x W blocks of its own: (B, ...)."""

    rows: Tensor  # (W,), blocks of the picture; so are columns
    columns: Tensor
    drawn: Tensor  # (C block^2, W, W): what it adds to a picture
    cover: Tensor  # (block^2, W, W): the share of each pixel that it covers


class ObjectWindows(nn.Module):
    """Labels, places and rotations -> blocks of pixels (B, C block^2, rows, columns), with a margin around them.

    `size`: height and width of a picture, in pixels.
    """

    def __init__(self, config: WindowsConfig, size: tuple[int, int], block: int, channels: int, margin: int) -> None:
        super().__init__()
        self.config, self.size, self.block, self.channels, self.margin = config, size, block, channels, margin
        self.window = math.ceil(config.side * size[1] / block)  # in blocks
        self.objects = min(config.objects, config.labels)
        width, hidden, curves = config.width, config.hidden, config.curves
        self.label = nn.Parameter(initial_weights(config.labels, width, std=0.5))
        self.place = nn.Linear(POSE, width)
        self.mix = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
        )  # fmt: skip
        self.curve = nn.Linear(width, curves * CONIC)
        self.look = nn.Linear(width, hidden)
        self.sharpness = nn.Parameter(torch.zeros(curves))
        self.seen = nn.Linear(curves + 2, hidden, bias=False)
        self.inner = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, channels + 1)
        with torch.no_grad():
            angles = torch.rand(curves) * 2 * math.pi
            start = torch.zeros(curves, CONIC)
            start[:, 0], start[:, 1], start[:, 2] = torch.randn(curves), angles.cos(), angles.sin()
            self.curve.bias.copy_(start.flatten())
            self.curve.weight.mul_(0.3)
            self.sharpness.copy_(torch.linspace(math.log(2.0), math.log(16.0), curves))  # a tenth to one a pixel
            self.out.bias[-1] = -3.0  # at first, nothing is covered

    def forward(self, labels: Tensor) -> Tensor:
        """Draw labels (B, K, 5 or more): multi-hot, position, cosine and sine of the rotation."""
        known, which = self.nearest_first(labels)
        B, N = which.shape
        there = known[..., 0] > 0.5
        sides = [side // self.block + 2 * self.margin for side in self.size]
        picture = known.new_zeros(B, self.channels * self.block**2, *sides)
        if torch.compiler.is_exporting():  # in shapes that do not depend on values
            windows = self.windows(known.flatten(0, 1), which.flatten())
            for n in reversed(range(N)):
                rows, columns, drawn, cover = (one.reshape(B, N, *one.shape[1:])[:, n] for one in windows)
                seen = there[:, n, None, None, None].float()
                picture = self._laid(picture, Windows(rows, columns, seen * drawn, seen * cover))
            return picture
        index = there.flatten().nonzero()[:, 0]  # only objects that are there
        windows = self.windows(known.flatten(0, 1)[index], which.flatten()[index])
        for n in reversed(range(N)):
            mine = (index % N == n).nonzero()[:, 0]
            at = index[mine] // N
            picture = picture.index_copy(0, at, self._laid(picture[at], Windows(*(one[mine] for one in windows))))
        return picture

    def nearest_first(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is known of the objects that are drawn (B, N, 5), the lowest first, and their labels (B, N).

        Of a picture with fewer objects, the last are not there.
        """
        which = (labels[..., 0] * 10 + labels[..., 2]).topk(self.objects, dim=1).indices
        return labels[..., :5].gather(1, which[..., None].expand(-1, -1, 5)).float(), which

    def windows(self, known: Tensor, which: Tensor) -> Windows:
        """Draw objects (B, 5), each in a window of its own, by their labels (B,)."""
        size = torch.tensor([self.size[1], self.size[0]], dtype=torch.float32, device=known.device)
        place = known[:, 1:3].clamp(0.0, 1.0) * size  # x, y in pixels
        first = (place / self.block).floor() - self.window // 2
        first = first + torch.tensor([0.0, 1.0], device=known.device)  # objects reach farther down, as shadows do
        blocks = torch.arange(self.window, device=known.device)
        columns, rows = (first[..., None] + blocks).unbind(1)
        # (B, block^2 W W): the middle of each pixel from the object's place
        inner = torch.arange(self.block, device=known.device) + 0.5
        x = (columns[:, None] * self.block + inner[:, None] - place[:, :1, None]) / UNIT  # (B, block, W)
        y = (rows[:, None] * self.block + inner[:, None] - place[:, 1:, None]) / UNIT
        u = x[:, None, :, None, :].expand(-1, self.block, -1, self.window, -1).flatten(1)
        v = y[:, :, None, :, None].expand(-1, -1, self.block, -1, self.window).flatten(1)
        h = self.mix(self.label[which] + self.place(pose(known)))
        curves = (
            F.normalize(self.curve(h).unflatten(1, (self.config.curves, CONIC)), dim=-1) * self.sharpness.exp()[:, None]
        )
        points = torch.stack([torch.ones_like(u), u, v, u * u, u * v, v * v], -1)  # (B, P, 6)
        seen = torch.cat([torch.tanh(points @ curves.transpose(1, 2)), points[..., 1:3]], -1)
        look = F.relu(self.seen(seen) + self.look(h)[:, None])
        out = self.out(F.relu(self.inner(look)))
        drawn, cover = out[..., :-1], out[..., -1:].sigmoid()
        W = self.window
        drawn = drawn.unflatten(1, (self.block**2, W, W)).permute(0, 4, 1, 2, 3).flatten(1, 2)
        return Windows(rows, columns, drawn, cover[..., 0].unflatten(1, (self.block**2, W, W)))

    def _laid(self, pictures: Tensor, windows: Windows) -> Tensor:
        """Lay one window over each of the pictures."""
        rows, columns, drawn, cover = windows
        sides = [torch.arange(-self.margin, side // self.block + self.margin, device=rows.device) for side in self.size]
        down = (sides[0][:, None] == rows[:, None]).float()[:, None]  # (n, 1, rows, W)
        across = (sides[1] == columns[..., None]).float()[:, None]  # (n, 1, W, columns)
        cover = (down @ cover @ across).repeat(1, self.channels, 1, 1)
        return pictures * (1 - cover) + down @ drawn @ across


class OneObject(nn.Module):
    """What is known of objects (B, 5), and their labels (B,) -> their `Windows`, (B, ...)."""

    def __init__(self, windows: ObjectWindows) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, known: Tensor, which: Tensor) -> tuple[Tensor, ...]:
        return self.windows.windows(known, which)


def lay(window: Windows, picture: Tensor, margin: int) -> None:
    """Lay one object's window over a picture (C block^2, rows, columns), in place."""
    W = len(window.rows)
    first = int(window.rows[0]) + margin, int(window.columns[0]) + margin
    there = [slice(max(at, 0), max(at + W, 0)) for at in first]
    inside = [slice(max(-at, 0), max(side - at, 0)) for at, side in zip(first, picture.shape[1:], strict=True)]
    below = picture[:, there[0], there[1]]
    drawn, cover = (one[:, inside[0], inside[1]] for one in window[2:])
    torch.addcmul(drawn, below, (1 - cover).repeat(len(drawn) // len(cover), 1, 1), out=below)


def pose(known: Tensor) -> Tensor:
    """Return what shape and look follow from: place and rotation of objects (B, 5), as (B, POSE)."""
    x, y = (4 * known[:, 1:3] - 2).unbind(-1)
    # An angle has a cut somewhere, and curves may change places there, as a shape that looks the same again after this
    # turn asks for: functions of cosine and sine alone could not.
    angle = torch.atan2(known[:, 4], known[:, 3] + 1e-12)
    turns = [angle * 0.5, angle * 0.25]
    return torch.stack(
        [x, y, x * x * 0.5, x * y * 0.5, y * y * 0.5, known[:, 3], known[:, 4]]
        + [wave(one) for one in turns for wave in (torch.sin, torch.cos)], -1,
    )  # fmt: skip
