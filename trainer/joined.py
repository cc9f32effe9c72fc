"""Pictures of several data sets as one tensor that is never built: each stays where it is, in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Joined:
    """Pictures (N, 3, S, S) uint8 of all parts, one part after another. Indexing reads those that are asked for.

    `rows`: which of all there are, and in which order; by default all.
    """

    def __init__(self, parts: Sequence[Tensor | Joined], rows: Tensor | None = None) -> None:
        self.parts, self.ends = tuple(parts), torch.tensor([len(part) for part in parts]).cumsum(0)
        self.rows = torch.arange(int(self.ends[-1])) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *self.parts[0].shape[1:]])

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        rows = self.rows[index]
        which = torch.searchsorted(self.ends, rows, right=True)
        found = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for k, part in enumerate(self.parts):
            here = which == k
            found[here] = part[rows[here] - (int(self.ends[k]) - len(part))]
        return found


def chunks(images: Tensor | Joined, size: int) -> Iterator[Tensor]:
    """Yield the pictures in order, `size` at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
