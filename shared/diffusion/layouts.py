"""Layouts: the positions of a picture's objects, drawn from a small network before the picture is sampled.

A position is an object's centre in fractions of the picture's width and height, from the upper left corner. A denoiser
that was trained with positions needs them for sampling, so a layout is drawn before the picture (layout before pixels
as in Zhao et al. 2019, positions as network input as in GLIGEN, Li et al. 2023).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Protocol

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.diffusion.layout_draws import draw_places
from shared.options import NoOtherFields

OUTSIDE = -10.0  # an unknown position, or that of an absent label: far from every pixel
LAYOUTS = "layouts."  # prefix of the layout network's tensors in a checkpoint
DRAWS = 4  # for each object: coarse row, fine row, coarse column, fine column
WAVES = 20  # sines and cosines of one coordinate: ten octaves, down to a 512th of a picture
OCTAVES = 2.0 ** torch.arange(WAVES // 2)

Positive = Annotated[int, Field(ge=1)]


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


class Layouts(Protocol):
    """The distribution of layouts given labels, as the sampling loop sees it."""

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw positions (K, 2) on the CPU for multi-hot labels (K,), `OUTSIDE` for absent ones."""


class LayoutConfig(NoOtherFields):
    """Everything that fixes the layout network's shape; saved in the checkpoint."""

    model_config = ConfigDict(frozen=True)

    num_labels: Positive
    most: Positive  # objects in one picture
    cells: Positive = 64  # coarse cells along each side, and fine cells along each side of a coarse one
    width: Positive = 64
    layers: Positive = 2
    heads: Positive = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3


class LayoutNetwork(nn.Module):
    """p(positions | label set), one object after the other in random order (order-agnostic, Uria et al. 2014).

    A position is four draws: a coarse cell's row, a fine row inside it, and the same for the column. So the network can
    learn both wide areas and exact places. The logits of each draw are a sum of two parts. A transformer (Vaswani et
    al. 2017) gives the first: two tokens stand for each object, one with its label and position, the other with its
    label alone, which sees the objects before it. A small network gives the second: a term for each object before it,
    from their positions alone, as objects keep each other at a distance (a pairwise interaction process).
    """

    octaves = len(OCTAVES)

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.config = config
        d, cells = config.width, config.cells
        self.label, self.dropped = nn.Embedding(config.num_labels, d), nn.Dropout(config.dropout)
        self.position = nn.Sequential(nn.Linear(2 * WAVES, d), nn.GELU(), nn.Linear(d, d))
        self.together = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))  # of the whole label set
        self.count = nn.Embedding(config.most + 1, d)
        self.blocks = nn.ModuleList(LayoutBlock(d, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        # fine cells do not see the labels: the network could otherwise learn single pictures by heart
        self.own = nn.ModuleList(_mlp(d * (i % 2 == 0) + 2 * WAVES, d, cells) for i in range(DRAWS))
        self.pair = nn.ModuleList(_mlp(6 * WAVES, d, d, cells) for _ in range(DRAWS))

    def forward(self, indices: Tensor, positions: Tensor) -> Tensor:
        """Return -log p in nats of each object's position given those before it: (B, N) float32.

        indices (B, N) int64: labels in the order of drawing; positions (B, N, 2) in [0, 1].
        """
        h = self._hidden(*self._unplaced(indices), positions)
        N, cells = indices.shape[1], self.config.cells
        fine = (positions.flip(-1) * cells**2).long().clamp(0, cells**2 - 1)  # (B, N, 2): row, column
        chosen = torch.stack([fine[..., 0] // cells, fine[..., 0] % cells, fine[..., 1] // cells, fine[..., 1] % cells])
        pairs = torch.tril_indices(N, N, -1, device=h.device)
        losses, waves = torch.zeros_like(positions[..., 0]), _waves(positions[:, pairs[1]])
        for i, cell in enumerate(chosen):
            logits = self._logits(i, h, _known(chosen[:i], cells, positions), positions, pairs, waves)
            losses = losses + F.cross_entropy(logits.float().movedim(-1, 1), cell, reduction="none")
        return losses

    @torch.inference_mode()
    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw positions (K, 2) for multi-hot labels (K,). Unknown if there are more labels than any picture had."""
        positions = torch.full((len(labels), 2), OUTSIDE)
        indices = torch.nonzero(labels.cpu() > 0).flatten()
        n = len(indices)
        if not 0 < n <= self.config.most:
            return positions
        indices = indices[torch.randperm(n, generator=generator)]
        positions[indices] = draw_places(self, indices, generator)
        return positions

    def step(self, objects: Tensor, places: Tensor, drawn: Tensor, object: Tensor, number: Tensor) -> Tensor:
        """Return the logits (DRAWS, cells) that `draw` draws one object's position from, in fixed shapes, for exports.

        objects (most,) int64: labels in the order of drawing, then padding; places (most, 2): those drawn so far.
        drawn (DRAWS,) int64: cells of the object, as far as they are drawn. object (1,) int64: which one; number (1,)
        int64: how many there are.
        """
        most, cells = self.config.most, self.config.cells
        h = self._hidden(*self._unplaced(objects[None], number), places[None]).index_select(1, object)  # (1, 1, D)
        before = (torch.arange(most, device=object.device) < object)[:, None]  # (most, 1)
        logits = []
        for i in range(DRAWS):
            known = _known(drawn[:i, None, None], cells, places[None, :1])  # (1, 1, 2)
            terms = self._pair_terms(
                i, known.expand(1, most, 2), places[None], _waves(places[None])
            )  # (1, most, cells)
            logits.append(self._own_logits(i, h, known)[:, 0] + (terms * before).sum(1))
        return torch.cat(logits)

    def _logits(self, i: int, h: Tensor, known: Tensor, places: Tensor, pairs: Tensor, waves: Tensor) -> Tensor:
        """Return the logits of draw i for M objects: (B, M, cells).

        h (B, M, D). known (B, M, 2): row and column as far as they are drawn, 0 before. places (B, N, 2): those of all
        objects. pairs (2, P): which of the M comes after which of the N. waves (B, P, 2 WAVES): of the latter's places,
        the same in all draws.
        """
        logits, (later, earlier) = self._own_logits(i, h, known), pairs
        if not len(later):
            return logits
        terms = self._pair_terms(i, known[:, later], places[:, earlier], waves)
        return logits.index_add(1, later, terms.to(logits.dtype))

    def _own_logits(self, i: int, h: Tensor, known: Tensor) -> Tensor:
        """Return the part that the labels, and the transformer, give: (B, M, cells)."""
        waves = _waves(known)
        logits: Tensor = self.own[i](torch.cat([h, waves.to(h.dtype)], -1) if i % 2 == 0 else waves)
        return logits

    def _pair_terms(self, i: int, known: Tensor, earlier: Tensor, waves: Tensor) -> Tensor:
        """Return the terms of pairs of objects: known (B, P, 2) of the later, earlier (B, P, 2) -> (B, P, cells).

        waves (B, P, 2 WAVES): of the earlier.
        """
        apart = known - earlier.flip(-1)
        if i < 2:
            apart = apart * torch.tensor([float(i > 0), 0.0])  # the column is not known yet
        terms: Tensor = self.pair[i](torch.cat([_waves(apart), waves, _waves(known)], -1))
        return terms

    def _unplaced(self, indices: Tensor, number: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return what does not depend on positions: the labels' tokens, without and with their context, and the mask.

        (B, N, D), (B, N, D) and (2N, 2N) bool. `number` (1,): how many objects there are, if the rest is padding.
        """
        N = indices.shape[1]
        names = self.dropped(self.label(indices))
        if number is None:
            context = self.together(names.sum(1)) + self.count.weight[N]
        else:
            there = (torch.arange(N, device=number.device) < number)[:, None]  # (N, 1)
            context = self.together((names * there).sum(1)) + self.count(number)
        earlier = torch.ones(N, N, dtype=torch.bool, device=names.device).tril(-1)
        own = torch.eye(N, dtype=torch.bool, device=names.device)
        none = torch.zeros_like(own)
        mask = torch.cat([torch.cat([earlier | own, none], 1), torch.cat([earlier, own], 1)])
        return names, names + context[:, None], mask

    def _hidden(self, names: Tensor, free: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Return what is known of each object before its position is drawn: (B, N, D)."""
        h = torch.cat([names + self.position(_waves(positions)), free], 1)  # (B, 2N, D)
        for block in self.blocks:
            h = block(h, mask)
        out: Tensor = self.norm(h[:, names.shape[1] :])
        return out


def _waves(values: Tensor) -> Tensor:
    """Return sines and cosines of (..., 2) in octaves: (..., 2 * WAVES)."""
    angles = (values[..., None] * math.pi * OCTAVES.to(values.device)).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def _known(drawn: Tensor | Sequence[Tensor], cells: int, like: Tensor) -> Tensor:
    """Return row and column (B, M, 2) as far as they are drawn: the corner of the cell, and 0 for what is not drawn."""
    found = torch.zeros_like(like)
    for i, cell in enumerate(drawn):
        _refine(found, i, cell, cells)
    return found


def _refine(known: Tensor, i: int, cell: Tensor, cells: int) -> None:
    """Add what draw i has given, cell (B, M), to row and column (B, M, 2)."""
    known[..., i // 2] += cell * [1 / cells, 1 / cells**2][i % 2]


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one, other in itertools.pairwise(widths):
        layers += [nn.Linear(one, other), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class LayoutBlock(nn.Module):
    """A transformer block with pre-norm; each token attends to those that `mask` allows it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # (B, T, D), (T, T) bool
        B, T, D = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = h + self.dropout(self.out(mixed.transpose(1, 2).reshape(B, T, D)))
        out: Tensor = h + self.dropout(self.mlp(self.norm2(h)))
        return out
