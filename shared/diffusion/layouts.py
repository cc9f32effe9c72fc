"""Where objects stand: positions beside labels, and arrangements remembered from the training pictures.

A position is the centre of an object in fractions of the picture's width and height, from the upper left corner.
A denoiser that was told positions while it was trained is told them while it samples: an arrangement is drawn first,
then the picture (layout before pixels as in Zhao et al. 2019, positions as input as in GLIGEN, Li et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OUTSIDE = -10.0  # a position that is not known, or of a label that is absent: far from every pixel


def with_positions(labels: Tensor, positions: Tensor) -> Tensor:
    """labels (..., K) and positions (..., K, 2) as what a network with positions takes: (..., K, 3)."""
    return torch.cat([labels[..., None], positions], dim=-1)


def positions_at(indices: Sequence[int], points: Sequence[tuple[float, float]], num_labels: int) -> Tensor:
    """Positions (K, 2) with `points[i]` for the label of index `indices[i]`; of the others they are not known."""
    positions = torch.full((num_labels, 2), OUTSIDE)
    positions[list(indices)] = torch.tensor(points, dtype=torch.float32).view(-1, 2)
    return positions


def nearest_pair(points: Tensor) -> float:
    """Smallest distance between two of points (n, 2); infinite for one alone."""
    return float(torch.pdist(points).min()) if len(points) > 1 else float("inf")


@dataclass(frozen=True)
class Layouts:
    """The prior over arrangements: M of them for each number of objects, 1 to N. `points`: (N, M, N, 2).

    `points[n - 1, m, :n]` are n positions that were seen in one picture.
    """

    points: Tensor

    @classmethod
    def of(cls, positions: Tensor, *, most: int = 8, count: int = 512) -> Layouts:
        """`count` arrangements for each number of objects up to `most`, of pictures with positions (P, K, 2).

        Drawn by a fixed seed from the half of the pictures in which the nearest two objects are further apart, so that
        objects seldom hide one another. A number of objects that no picture has keeps positions that are not known.
        """
        known = positions[..., 0] != OUTSIDE  # (P, K)
        numbers = known.sum(1)
        most = min(most, int(numbers.max()))
        points = torch.full((most, count, most, 2), OUTSIDE)
        generator = torch.Generator().manual_seed(0)
        for n in range(1, most + 1):
            pictures = numbers == n
            if pictures.any():
                seen = positions[pictures][known[pictures]].view(-1, n, 2)
                clear = torch.tensor([nearest_pair(one) for one in seen])
                seen = seen[clear >= clear.median()]
                points[n - 1, :, :n] = seen[torch.randint(len(seen), (count,), generator=generator)]
        return cls(points)

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Positions for labels (K,): one arrangement, its places dealt out at random. (K, 2) on the CPU.

        Not known where there are more labels than any arrangement has.
        """
        positions = torch.full((len(labels), 2), OUTSIDE)
        there = torch.nonzero(labels.cpu() > 0).flatten()
        n = len(there)
        if 0 < n <= len(self.points):
            arrangement = self.points[n - 1, int(torch.randint(self.points.shape[1], (), generator=generator)), :n]
            positions[there] = arrangement.float().cpu()[torch.randperm(n, generator=generator)]
        return positions
