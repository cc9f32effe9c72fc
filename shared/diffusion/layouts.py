"""Layouts: the positions of a picture's objects, drawn from a small network before the picture is sampled.

A position is an object's centre in fractions of the picture's width and height, from the upper left corner. A denoiser
that was trained with positions needs them for sampling, so a layout is drawn before the picture (layout before pixels
as in Zhao et al. 2019, positions as network input as in GLIGEN, Li et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Protocol

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.options import NoOtherFields

OUTSIDE = -10.0  # an unknown position, or that of an absent label: far from every pixel
LAYOUTS = "layouts."  # prefix of the layout network's tensors in a checkpoint
COORDINATES = 4  # draws for each object: coarse x, coarse y, fine x, fine y

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
    width: Positive = 96
    layers: Positive = 3
    heads: Positive = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class LayoutNetwork(nn.Module):
    """p(positions | label set), one object after the other in random order (order-agnostic, Uria et al. 2014).

    A transformer (Vaswani et al. 2017) with two tokens for each object: one holds its label and position, the other its
    label alone and predicts its position from the objects before it. A position is four draws: a coarse cell's column
    and row, then the column and row of a fine cell inside. So the network can learn both wide areas and exact places.
    The fine cell depends on the coarse one alone: the network could otherwise learn single pictures by heart.
    """

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.config = config
        d, cells = config.width, config.cells
        self.label = nn.Embedding(config.num_labels, d)
        self.position = nn.Sequential(nn.Linear(2 * len(self._frequencies()) * 2, d), nn.GELU(), nn.Linear(d, d))
        self.together = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))  # of the whole label set
        self.count = nn.Embedding(config.most + 1, d)
        self.blocks = nn.ModuleList(LayoutBlock(d, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        # of cells that have been drawn: the coarse column; the coarse cell's column and row; the fine column
        self.drawn = nn.ModuleList(nn.Embedding(cells, d) for _ in range(COORDINATES))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, cells)) for _ in range(COORDINATES)
        )

    def _frequencies(self) -> Tensor:
        return math.pi * 2.0 ** torch.arange(8)

    def forward(self, indices: Tensor, positions: Tensor) -> Tensor:
        """Return -log p in nats of each object's position given those before it: (B, N) float32.

        indices (B, N) int64: labels in the order of drawing; positions (B, N, 2) in [0, 1].
        """
        h = self._hidden(indices, positions)
        chosen = self._cells(positions)  # (B, N, 4)
        losses = []
        for i, head in enumerate(self.heads):
            logits = head(self._known(h, chosen[..., :i].unbind(-1)))
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), chosen[..., i].flatten(), reduction="none"))
        return torch.stack(losses).sum(0).view(indices.shape)

    @torch.inference_mode()
    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw positions (K, 2) for multi-hot labels (K,). Unknown if there are more labels than any picture had."""
        positions = torch.full((len(labels), 2), OUTSIDE)
        indices = torch.nonzero(labels.cpu() > 0).flatten()
        n = len(indices)
        if not 0 < n <= self.config.most:
            return positions
        indices = indices[torch.randperm(n, generator=generator)][None]  # (1, n)
        places = torch.zeros(1, n, 2)
        for j in range(n):
            h = self._hidden(indices, places)[0, j]
            drawn: list[Tensor] = []
            for head in self.heads:
                cumulative = head(self._known(h, drawn)).double().softmax(-1).cumsum(-1)
                u = torch.rand((), generator=generator, dtype=torch.float64)
                drawn.append(torch.searchsorted(cumulative, u).clamp(max=self.config.cells - 1))
            inside = torch.rand(2, generator=generator)
            fine = (torch.stack(drawn[2:]) + inside) / self.config.cells
            places[0, j] = (torch.stack(drawn[:2]) + fine) / self.config.cells
        positions[indices[0]] = places[0]
        return positions

    def _known(self, h: Tensor, drawn: Sequence[Tensor]) -> Tensor:
        """Return the input of the next draw: h (..., D) for coarse cells, and the cells drawn so far."""
        if len(drawn) < 2:
            return h + self.drawn[0](drawn[0]) if drawn else h
        cell: Tensor = self.drawn[1](drawn[0]) + self.drawn[2](drawn[1])
        return cell + self.drawn[3](drawn[2]) if len(drawn) > 2 else cell

    def _cells(self, positions: Tensor) -> Tensor:
        """Return the coarse and fine cells of positions (..., 2): (..., 4) int64."""
        scaled = (positions * self.config.cells**2).long().clamp(0, self.config.cells**2 - 1)
        return torch.cat([scaled // self.config.cells, scaled % self.config.cells], -1)

    def _hidden(self, indices: Tensor, positions: Tensor) -> Tensor:
        """Return what is known of each object before its position is drawn: (B, N, D)."""
        N = indices.shape[1]
        names = self.label(indices)  # (B, N, D)
        angles = (positions[..., None] * self._frequencies().to(positions)).flatten(-2)  # (B, N, 16)
        placed = names + self.position(torch.cat([angles.sin(), angles.cos()], -1))
        context = self.together(names.sum(1)) + self.count.weight[N]
        h = torch.cat([placed, names + context[:, None]], 1)  # (B, 2N, D)
        earlier = torch.ones(N, N, dtype=torch.bool, device=h.device).tril(-1)
        own = torch.eye(N, dtype=torch.bool, device=h.device)
        none = torch.zeros_like(own)
        mask = torch.cat([torch.cat([earlier | own, none], 1), torch.cat([earlier, own], 1)])  # (2N, 2N)
        for block in self.blocks:
            h = block(h, mask)
        out: Tensor = self.norm(h[:, N:])
        return out


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


class RememberedLayouts:
    """M layouts for each number of objects up to N, (N, M, N, 2): what checkpoints held before the layout network."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one layout and assign its places to the labels at random: (K, 2)."""
        positions = torch.full((len(labels), 2), OUTSIDE)
        there = torch.nonzero(labels.cpu() > 0).flatten()
        n = len(there)
        if 0 < n <= len(self.points):
            layout = self.points[n - 1, int(torch.randint(self.points.shape[1], (), generator=generator)), :n]
            positions[there] = layout.float().cpu()[torch.randperm(n, generator=generator)]
        return positions
