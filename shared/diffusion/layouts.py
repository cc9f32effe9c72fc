"""Layouts: the positions of a picture's objects, drawn from layouts that occur in the training pictures.

A position is an object's centre in fractions of the picture's width and height, from the upper left corner. A denoiser
that was trained with positions needs them for sampling, so a layout is drawn before the picture (layout before pixels
as in Zhao et al. 2019, positions as network input as in GLIGEN, Li et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OUTSIDE = -10.0  # an unknown position, or that of an absent label: far from every pixel


def with_positions(labels: Tensor, positions: Tensor) -> Tensor:
    """Join labels (..., K) and positions (..., K, 2) to the input of a network with positions: (..., K, 3)."""
    return torch.cat([labels[..., None], positions], dim=-1)


def positions_at(indices: Sequence[int], points: Sequence[tuple[float, float]], num_labels: int) -> Tensor:
    """Return positions (K, 2) with `points[i]` for the label of index `indices[i]`, and unknown for the others."""
    positions = torch.full((num_labels, 2), OUTSIDE)
    positions[list(indices)] = torch.tensor(points, dtype=torch.float32).view(-1, 2)
    return positions


def nearest_pair(points: Tensor) -> float:
    """Return the smallest distance between two of the points (n, 2); infinite for a single point."""
    return float(torch.pdist(points).min()) if len(points) > 1 else float("inf")


@dataclass(frozen=True)
class Layouts:
    """The prior over layouts: M of them for each number of objects, 1 to N. `points`: (N, M, N, 2).

    `points[n - 1, m, :n]` are the n positions of one training picture.
    """

    points: Tensor

    @classmethod
    def of(cls, positions: Tensor, *, most: int = 8, count: int = 512) -> Layouts:
        """Draw `count` layouts for each number of objects up to `most`, from P pictures with positions (P, K, 2).

        They are drawn with a fixed seed from the half of the pictures whose nearest two objects are further apart, so
        that objects rarely hide each other. For a number of objects that no picture has, positions are unknown.
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
        """Draw positions for labels (K,): one layout, its places assigned to the labels at random. (K, 2) on the CPU.

        They are unknown if there are more labels than any layout has objects.
        """
        positions = torch.full((len(labels), 2), OUTSIDE)
        there = torch.nonzero(labels.cpu() > 0).flatten()
        n = len(there)
        if 0 < n <= len(self.points):
            layout = self.points[n - 1, int(torch.randint(self.points.shape[1], (), generator=generator)), :n]
            positions[there] = layout.float().cpu()[torch.randperm(n, generator=generator)]
        return positions
