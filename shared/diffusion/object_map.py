"""Maps what each object looks like where, from label, place and rotation: an upsampler draws straight edges by it.

Each object is decoded in coordinates of its own (Watters et al. 2019), and masks say which one is seen (Locatello et
al. 2020, sec. 2.2). What is decoded are the sides of a few lines, whose slopes and offsets follow from label, place and
rotation: so an edge of a cube is a line, at any rotation and distance.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from shared.device import initial_weights

LINES: Final = 32  # of each object
WIDTH: Final = 192  # of the network that draws an object's lines
REACH: Final = 0.12  # unit of an object's own coordinates, in sides of the picture
FARTHEST: Final = 8.0  # of these units: an unknown place is no farther
NEARBY: Final = 4.0  # of the mask's logits: what an object has at its middle, none about 1.4 units away
LEAST: Final = -16.0  # and what it has at least


class ObjectMap(nn.Module):
    """Labels, places and rotations -> what is seen where, and how near an object is.

    (B, 2 LINES, R, C), and logits (B, 1, R, C) of being near enough to an object's middle to be part of it.
    `objects`: how many a picture has at most; of more, those of the last labels are left out.
    """

    channels: Final = 2 * LINES

    def __init__(self, num_labels: int, objects: int) -> None:
        super().__init__()
        self.objects = min(objects, num_labels)
        self.label = nn.Parameter(initial_weights(num_labels, WIDTH, std=0.5))
        self.place = nn.Linear(4, WIDTH)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.lines = nn.Linear(WIDTH, 3 * LINES)
        self.look = nn.Linear(WIDTH, LINES)
        self.mask = nn.Linear(LINES, 1)

    def forward(self, labels: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map what is at y and x (B, R, C) in fractions of the picture's sides; (B, R, 1) and (B, 1, C) for a grid.

        labels (B, K, 5): multi-hot, position, cosine and sine of the rotation, as a network with rotations takes.
        """
        # in the labels' order, whatever the order in which equal values are sorted
        first = labels[..., 0] - 1e-4 * torch.arange(labels.shape[1], device=labels.device)
        which = first.topk(self.objects, dim=1).indices  # (B, N)
        known = labels.gather(1, which[..., None].expand(-1, -1, labels.shape[-1])).float()  # (B, N, 5)
        there, places = known[..., 0], known[..., 1:3]
        h = self.mix(self.label[which] + self.place(torch.cat([4 * places - 2, 2 * known[..., 3:]], -1)))
        u, v = self._own(places[..., 0], x), self._own(places[..., 1], y)  # (B, N, R, C)
        slope_u, slope_v, offset = self.lines(h)[:, :, None, None].chunk(3, -1)  # (B, N, 1, 1, LINES)
        sides = torch.tanh(u[..., None] * slope_u + (v[..., None] * slope_v + offset))  # (B, N, R, C, LINES)
        near = (NEARBY - 2 * (u.square() + v.square())).clamp(min=LEAST) + 1e4 * (there - 1)[..., None, None]
        logits = self.mask(sides)[..., 0] + near
        seen = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1).softmax(1)[:, 1:]  # the first is the background
        looks = torch.einsum("bnrc,bnl->brcl", seen, self.look(h))
        drawn = torch.cat([(seen[..., None] * sides).sum(1), looks], -1).permute(0, 3, 1, 2)
        return drawn, near.amax(1, keepdim=True)

    @staticmethod
    def _own(centre: Tensor, at: Tensor) -> Tensor:
        """Return where `at` (B, R, C) is, seen from each object: (B, N, R, C)."""
        return ((at[:, None] - centre[..., None, None]) / REACH).clamp(-FARTHEST, FARTHEST)
