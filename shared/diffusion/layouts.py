"""Layouts: the positions of a picture's objects, drawn from a small network before the picture is sampled.

A position is an object's centre in fractions of the picture's width and height, from the upper left corner. A denoiser
that was trained with positions needs them for sampling, so a layout is drawn before the picture (layout before pixels
as in Zhao et al. 2019, positions as network input as in GLIGEN, Li et al. 2023).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Final, Protocol

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.options import Count, NoOtherFields

# Columns of what a network is given of each label, after whether it is there; picture-wide inputs follow (`inputs.py`)
PLACE: Final = slice(1, 3)  # x and y, if the network takes positions
ROTATION: Final = slice(3, 5)  # cosine and sine, if it takes rotations

OUTSIDE = -10.0  # an unknown position, or that of an absent label: far from every pixel
LAYOUTS = "layouts."  # prefix of the layout network's tensors in a checkpoint
DRAWS = 4  # for each object: coarse row, coarse column, fine row, fine column
WAVES = 20  # sines and cosines of one coordinate: ten octaves, down to a 512th of a picture
Cache = tuple[Tensor, Tensor]  # keys and values (B, heads, J, D / heads) of J tokens
ANGLES = math.pi * 2.0 ** torch.arange(WAVES // 2)


def with_positions(labels: Tensor, positions: Tensor, rotations: Tensor | None = None) -> Tensor:
    """Join labels (..., K) and positions (..., K, 2) to the input of a network with positions: (..., K, 3).

    With rotations (..., K, 2), see `as_rotations`, it is that of a network which takes them too: (..., K, 5).
    """
    parts = [labels[..., None], positions]
    return torch.cat(parts if rotations is None else [*parts, rotations], dim=-1)


def as_rotations(turns: Tensor) -> Tensor:
    """Return cosine and sine of rotations (..., K), as (..., K, 2); zeros for NaN, which is unknown.

    A rotation is a fraction of the smallest turn after which the object looks the same, so that 0 and 1 are alike.
    """
    angles = turns * 2 * math.pi
    return torch.stack([angles.cos(), angles.sin()], -1).nan_to_num(0)


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

    def draw(self, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw positions (B, K, 2) on the CPU for multi-hot labels (B, K), `OUTSIDE` for absent ones."""


class LayoutConfig(NoOtherFields):
    """Everything that fixes the layout network's shape; saved in the checkpoint."""

    model_config = ConfigDict(frozen=True)

    num_labels: Count
    most: Count  # objects in one picture
    cells: Count = 64  # coarse cells along each side, and fine cells along each side of a coarse one
    width: Count = 64
    rank: Count = 48  # of maps of the coarse cells, which are products of factors for rows and for columns
    layers: Count = 2
    heads: Count = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3

    def model_post_init(self, _: object) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of the {self.heads} heads")


class LayoutNetwork(nn.Module):
    """p(positions | label set), one object after the other in random order (order-agnostic, Uria et al. 2014).

    A position is four draws: a coarse row and column, then a fine row and column inside them. So the network can learn
    both wide areas and exact places. A map of the coarse cells gives the first two: what a transformer (Vaswani et al.
    2017) makes of the labels, and of the objects before, minus the footprint of each of those, from its position alone,
    as objects keep each other at a distance (a pairwise interaction process). A row is as likely as all its cells. To
    the logits of the other three draws, each object before adds a term that knows what is drawn so far. In the
    transformer two tokens stand for each object, one with its label and position, the other with its label alone, which
    sees the objects before it.
    """

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
        self.wanted = _mlp(d, d, config.rank)
        self.sides = nn.ModuleList(_mlp(WAVES, d, config.rank) for _ in range(2))  # rows, columns
        self.footprint = Footprint(d // 2, config.rank, cells)
        # fine cells do not see the labels: the network could otherwise learn single pictures by heart
        self.own = nn.ModuleList(_mlp(2 * WAVES, d, cells) for _ in range(DRAWS - 2))
        self.pair = nn.ModuleList(_mlp(6 * WAVES, d, d, cells) for _ in range(DRAWS - 1))

    def forward(self, indices: Tensor, positions: Tensor) -> Tensor:
        """Return -log p in nats of each object's position given those before it: (B, N) float32.

        indices (B, N) int64: labels in the order of drawing; positions (B, N, 2) in [0, 1].
        """
        h = self._hidden(*self.unplaced(indices), positions)
        N, cells = indices.shape[1], self.config.cells
        places = positions.flip(-1)  # row, column
        fine = (places * cells**2).long().clamp(0, cells**2 - 1)
        drawn = torch.cat([fine // cells, fine % cells], -1).unbind(-1)  # DRAWS of (B, N)
        footprints = self.footprint(places[:, :-1]).float().cumsum(1)  # of all objects before each but the first
        coarse = self._map(h).float() - F.pad(footprints, (0, 0, 0, 0, 1, 0))
        losses = _cross_entropy(coarse.logsumexp(-1), drawn[0])
        in_row = coarse.take_along_dim(drawn[0][..., None, None], 2)[:, :, 0]
        (later, earlier), known = torch.tril_indices(N, N, -1, device=h.device), torch.zeros_like(places)
        of_places = waves(places)
        for i in range(1, DRAWS):
            known = refined(known, i - 1, drawn[i - 1], cells)
            of_known = waves(known)
            logits = in_row if i == 1 else self.own[i - 2](of_known).float()
            apart = known[:, later] - places[:, earlier]
            terms = self.pair_terms(i, apart, of_places[:, earlier], of_known[:, later])
            losses = losses + _cross_entropy(logits.index_add(1, later, terms.float()), drawn[i])
        return losses

    def step(self, objects: Tensor, places: Tensor, drawn: Tensor, object: Tensor, number: Tensor) -> Tensor:
        """Return the logits (DRAWS, cells) that one object's position is drawn from, in fixed shapes, for exports.

        objects (most,) int64: labels in the order of drawing, then padding; places (most, 2): those drawn so far.
        drawn (DRAWS,) int64: cells of the object, as far as they are drawn. object (1,) int64: which one; number (1,)
        int64: how many there are.
        """
        most, cells = self.config.most, self.config.cells
        h = self._hidden(*self.unplaced(objects[None], number), places[None]).index_select(1, object)  # (1, 1, D)
        before = (torch.arange(most, device=object.device) < object)[:, None]  # (most, 1)
        others = places[None].flip(-1)
        coarse = self._map(h)[0, 0] - (self.footprint(others)[0] * before[..., None]).sum(0)
        logits, known = [coarse.logsumexp(-1)], torch.zeros_like(places[None, :1])  # (1, 1, 2)
        for i in range(1, DRAWS):
            known = refined(known, i - 1, drawn[None, i - 1 : i], cells)
            of_known = waves(known)  # (1, 1, 2 WAVES)
            own = coarse.index_select(0, drawn[:1])[0] if i == 1 else self.own[i - 2](of_known)[0, 0]
            terms = self.pair_terms(i, known - others, waves(others), of_known)  # (1, most, cells)
            logits.append(own + (terms[0] * before).sum(0))
        return torch.stack(logits)

    def _map(self, h: Tensor) -> Tensor:
        """Return what the transformer wants of each coarse cell: h (B, M, D) -> (B, M, cells, cells), rows first."""
        rows, columns = self.factors()
        wanted: Tensor = (self.wanted(h)[..., None, :] * rows) @ columns.T
        return wanted

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of all coarse rows and columns, (cells, rank) each, which depend on no picture."""
        middles = waves(_middles(self.config.cells, self.count.weight.device))
        rows, columns = (side(middles) for side in self.sides)
        return rows, columns

    def pair_terms(self, i: int, apart: Tensor, of_earlier: Tensor, of_known: Tensor) -> Tensor:
        """Return the terms of P pairs of objects in draw i: (B, P, cells).

        apart (B, P, 2): from the earlier's row and column to those of the later, as far as they are drawn. of_earlier,
        of_known: `waves` of both, (B, P, 2 WAVES); the latter may be one for all pairs.
        """
        of_known = of_known.expand_as(of_earlier)
        terms: Tensor = self.pair[i - 1](torch.cat([waves(apart), of_earlier, of_known], -1))
        return terms

    def unplaced(self, indices: Tensor, number: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
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

    def placed(self, names: Tensor, positions: Tensor) -> Tensor:
        """Return the tokens (B, M, D) of objects whose positions (B, M, 2) are known."""
        tokens: Tensor = names + self.position(waves(positions))
        return tokens

    def _hidden(self, names: Tensor, free: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Return what is known of each object before its position is drawn: (B, N, D)."""
        h = torch.cat([self.placed(names, positions), free], 1)  # (B, 2N, D)
        for block in self.blocks:
            h = block(h, mask)
        out: Tensor = self.norm(h[:, names.shape[1] :])
        return out


class Footprint(nn.Module):
    """How much an object lowers the logits of all coarse cells: places (..., 2), row and column -> (..., cells, cells).

    Softplus of a sum of `rank` products of a factor for the row and one for the column: nothing where objects do not
    disturb each other, as much as is needed where they do.
    """

    def __init__(self, width: int, rank: int, cells: int) -> None:
        super().__init__()
        self.rows, self.columns = Factors(width, rank, cells), Factors(width, rank, cells)
        self.bias = nn.Parameter(torch.tensor(-3.0))  # at first no object disturbs another

    def forward(self, places: Tensor) -> Tensor:
        of_places = waves(places)
        rows, columns = self.rows(places[..., :1], of_places), self.columns(places[..., 1:], of_places)
        return F.softplus(rows @ columns.transpose(-2, -1) + self.bias)


class Factors(nn.Module):
    """The factors of each coarse row, or column: (..., cells, rank).

    Given an object's row, or column, `at` (..., 1), and `waves` of its place, `of_place` (..., 2 WAVES).
    """

    def __init__(self, width: int, rank: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.offset, self.hidden, self.out = nn.Linear(WAVES, width), nn.Linear(width, width), nn.Linear(width, rank)
        self.line, self.place = (nn.Linear(n * WAVES, width, bias=False) for n in (1, 2))

    def forward(self, at: Tensor, of_place: Tensor) -> Tensor:
        middles = _middles(self.cells, at.device)
        apart = waves(middles - at[..., None])  # (..., cells, WAVES)
        h = self.offset(apart) + self.line(waves(middles)) + self.place(of_place)[..., None, :]
        out: Tensor = self.out(F.relu(self.hidden(F.relu(h))))
        return out


def _middles(cells: int, device: torch.device) -> Tensor:
    """Return the middles of the coarse cells along one side: (cells, 1)."""
    return ((torch.arange(cells, device=device) + 0.5) / cells)[:, None]


def waves(values: Tensor) -> Tensor:
    """Return sines and cosines of (..., C) in octaves: (..., C * WAVES)."""
    angles = (values[..., None] * ANGLES.to(values.device)).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def refined(known: Tensor, i: int, cell: Tensor, cells: int) -> Tensor:
    """Return row and column (..., 2), as far as they were drawn, with what draw i has given: cell (...)."""
    size = 1 / cells if i < 2 else 1 / cells**2
    return known + torch.stack([cell * (i % 2 == 0), cell * (i % 2 == 1)], -1) * size


def _cross_entropy(logits: Tensor, cell: Tensor) -> Tensor:
    """Return -log p of each drawn cell: logits (B, N, C), cell (B, N) -> (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), cell.flatten(), reduction="none").view(cell.shape)


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
        return self.extend(h, mask)[0]

    def extend(self, h: Tensor, mask: Tensor | None, before: Cache | None = None) -> tuple[Tensor, Cache]:
        """Return h (B, T, D) after the block, and the keys and values of the J tokens before it and its own.

        mask: (T, J + T) bool; None if each token sees all.
        """
        B, T, D = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if before is not None:
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = h + self.dropout(self.out(mixed.transpose(1, 2).reshape(B, T, D)))
        return h + self.dropout(self.mlp(self.norm2(h))), (k, v)
