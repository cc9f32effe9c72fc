"""Draws positions from the layout network, one object of each picture after the other.

The keys and values of placed objects are kept, as nothing that comes later changes them. A test compares with passes of
the whole network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from shared.device import torch_threads
from shared.diffusion.layouts import DRAWS, OUTSIDE, WAVES, Cache, LayoutBlock, LayoutNetwork, refined, waves


class LayoutDrawer:
    """Draws layouts from a network in eval mode, whose weights must not change afterwards."""

    @torch.inference_mode()
    def __init__(self, network: LayoutNetwork) -> None:
        self.network = network
        self.blocks = [cast(LayoutBlock, block) for block in network.blocks]
        self.rows, self.columns = network.factors()

    @torch.inference_mode()
    def draw(self, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw positions (B, K, 2) for multi-hot labels (B, K), each with its generator.

        A picture's positions are the same in every batch. They are unknown if it has more labels than any had.
        """
        positions = torch.full((*labels.shape, 2), OUTSIDE)
        orders = [torch.nonzero(own > 0).flatten() for own in labels.cpu()]
        for n in range(1, self.network.config.most + 1):
            if not (which := [i for i, order in enumerate(orders) if len(order) == n]):
                continue
            own = [generators[i] for i in which]
            indices = torch.stack([orders[i][torch.randperm(n, generator=generators[i])] for i in which])
            with torch_threads(1):  # layers are so small that waking other threads takes longer than they do
                positions[torch.tensor(which)[:, None], indices] = self._places(indices, own)
        return positions

    def _places(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw the positions (B, n, 2) of objects with labels `indices` (B, n), in this order."""
        network, (B, n), cells = self.network, indices.shape, self.network.config.cells
        chances, inside = _random(generators, n)
        names, free, _ = network.unplaced(indices)
        kept: list[Cache | None] = [None] * len(self.blocks)
        places, of_places = torch.zeros(B, n, 2), torch.zeros(B, n, 2 * WAVES)  # row, column
        occupied = torch.zeros(B, cells, cells)
        for j in range(n):
            h, mask = free[:, j : j + 1], None
            if j:  # beside the object itself, the one before, which now has a place and does not see this one
                before = network.placed(names[:, j - 1 : j], places[:, j - 1 : j].flip(-1))
                h, mask = torch.cat([before, h], 1), torch.ones(2, j + 1, dtype=torch.bool)
                mask[0, -1] = False
                occupied += network.footprint(places[:, j - 1])
            for b, block in enumerate(self.blocks):
                h, (keys, values) = block.extend(h, mask, kept[b])
                kept[b] = keys[:, :, :-1], values[:, :, :-1]
            coarse = (network.wanted(network.norm(h[:, -1:])) * self.rows) @ self.columns.T - occupied
            row = cell = _drawn(coarse.logsumexp(-1), chances[:, j, 0])
            known = torch.zeros(B, 2)
            for i in range(1, DRAWS):
                known = refined(known, i - 1, cell, cells)
                of_known = waves(known)
                logits = coarse[torch.arange(B), row] if i == 1 else network.own[i - 2](of_known)
                if j:
                    apart = known[:, None] - places[:, :j]
                    logits = logits + network.pair_terms(i, apart, of_places[:, :j], of_known[:, None]).sum(1)
                cell = _drawn(logits, chances[:, j, i])
            places[:, j] = refined(known, DRAWS - 1, cell, cells) + inside[:, j] / cells**2
            of_places[:, j] = waves(places[:, j])
        return places.flip(-1)


def _random(generators: Sequence[torch.Generator], n: int) -> tuple[Tensor, Tensor]:
    """Return what decides about the cells of n objects (B, n, DRAWS), and about the places in these (B, n, 2)."""
    chances, inside = list[Tensor](), list[Tensor]()
    for generator in generators:
        for _ in range(n):
            chances.append(torch.rand(DRAWS, generator=generator, dtype=torch.float64))
            inside.append(torch.rand(2, generator=generator))
    return torch.stack(chances).view(-1, n, DRAWS), torch.stack(inside).view(-1, n, 2)


def _drawn(logits: Tensor, chances: Tensor) -> Tensor:
    """Draw a cell from each row of logits (B, C), given numbers (B,) in [0, 1): (B,)."""
    below = logits.double().softmax(-1).cumsum(-1) < chances[:, None]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)
