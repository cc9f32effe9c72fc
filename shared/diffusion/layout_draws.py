"""Draws positions from the layout network, one object after the other, in NumPy.

Its numbers are so few that torch's calls take several times as long as their arithmetic. The keys and values of placed
objects are kept, as nothing that comes later changes them. A test compares with the network itself.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.diffusion.layouts import OUTSIDE, WAVES, Factors, Footprint, LayoutBlock, LayoutNetwork

Array = NDArray[np.float32]
ANGLES = np.pi * 2.0 ** np.arange(WAVES // 2, dtype=np.float32)
ERF_P = np.float32(0.3275911 / 2**0.5)
ERF_A = tuple(np.float32(a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
Placed = tuple[Array, Array]  # keys and values (J, heads, D / heads) of placed objects in one block


class LayoutDrawer:
    """Draws layouts from a network in eval mode, whose weights must not change afterwards."""

    def __init__(self, network: LayoutNetwork) -> None:
        self.network, self.cells = network, network.config.cells
        self.blocks = [_Block(cast(LayoutBlock, block)) for block in network.blocks]
        self.position, self.wanted = _Mlp(network.position), _Mlp(network.wanted)
        self.own, self.pair = ([_Mlp(cast(nn.Sequential, mlp)) for mlp in part] for part in (network.own, network.pair))
        self.norm = _Norm(network.norm)
        self.names, self.counts, self.together = (
            _array(network.label.weight), _array(network.count.weight), _Mlp(network.together)
        )  # fmt: skip
        middles = (np.arange(self.cells, dtype=np.float32)[:, None] + np.float32(0.5)) / np.float32(self.cells)
        of_middles = _waves(middles)
        self.rows, columns = (_Mlp(cast(nn.Sequential, side))(of_middles) for side in network.sides)  # (cells, K)
        self.columns = columns.T
        self.footprint = _Footprint(network.footprint, middles)

    @torch.inference_mode()
    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw positions (K, 2) for multi-hot labels (K,). Unknown if there are more labels than any picture had."""
        positions = torch.full((len(labels), 2), OUTSIDE)
        indices = torch.nonzero(labels.cpu() > 0).flatten()
        if 0 < len(indices) <= self.network.config.most:
            indices = indices[torch.randperm(len(indices), generator=generator)]
            positions[indices] = self(indices, generator)
        return positions

    def __call__(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the positions (n, 2) of objects with labels `indices` (n,), in this order."""
        n, cells = len(indices), self.cells
        names = self.names[indices.numpy()]  # (n, D)
        free = names + self.together(names.sum(0)) + self.counts[n]
        placed: list[Placed] = [block.nothing() for block in self.blocks]
        places, of_places = np.zeros((n, 2), np.float32), np.zeros((n, 2 * WAVES), np.float32)  # row, column
        occupied = np.zeros((cells, cells), np.float32)
        for j in range(n):
            if j:
                x = names[j - 1] + self.position(_waves(places[j - 1, ::-1]))
                for b, block in enumerate(self.blocks):
                    x, placed[b] = block(x, placed[b])
                occupied += self.footprint(places[j - 1], of_places[j - 1])
            h = free[j]
            for block, before in zip(self.blocks, placed, strict=True):
                h, _ = block(h, before)
            coarse = cast(Array, (self.wanted(self.norm(h)) * self.rows) @ self.columns - occupied)
            known = np.zeros(2, np.float32)
            row = _draw(_log_sum_exp(coarse), generator)
            known[0] = row / cells
            for i, terms in enumerate(self.pair, 1):
                so_far = _waves(known)
                logits = coarse[row] if i == 1 else self.own[i - 2](so_far)
                if j:
                    inputs = [_waves(known - places[:j]), of_places[:j], np.broadcast_to(so_far, (j, len(so_far)))]
                    logits = logits + terms(np.concatenate(inputs, -1)).sum(0)
                known[i % 2] += _draw(logits, generator) / (cells if i < 2 else cells**2)
            places[j] = known + torch.rand(2, generator=generator).numpy() / cells**2
            of_places[j] = _waves(places[j])
        return torch.from_numpy(places[:, ::-1].copy())


def _draw(logits: Array, generator: torch.Generator) -> int:
    odds = np.exp(logits.astype(np.float64) - logits.max())
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    return min(int(np.searchsorted(np.cumsum(odds), u * odds.sum())), len(logits) - 1)


def _log_sum_exp(x: Array) -> Array:
    """Return the logarithm of the sum of exp(x) over the last axis."""
    most = x.max(-1)
    found: Array = np.log(np.exp(x - most[..., None]).sum(-1)) + most
    return found


def _array(parameter: Tensor) -> Array:
    array: Array = parameter.detach().numpy()
    return array


def _gelu(x: Array) -> Array:
    """GELU, x Phi(x) (Hendrycks & Gimpel 2016), with the error function of Abramowitz & Stegun 1964, 7.1.26.

    torch's own wakes all threads, however few the numbers are: with two of them and a busy machine, the layout of three
    objects takes 14 times as long.
    """
    size = np.abs(x)
    t = 1 / (1 + ERF_P * size)
    beyond = t * (ERF_A[0] + t * (ERF_A[1] + t * (ERF_A[2] + t * (ERF_A[3] + t * ERF_A[4])))) * np.exp(-0.5 * x * x)
    gelu: Array = 0.5 * (x + size * (1 - beyond))
    return gelu


def _waves(values: Array) -> Array:
    """Return sines and cosines of (..., C) in octaves: (..., C * WAVES)."""
    angles = (values[..., None] * ANGLES).reshape(*values.shape[:-1], -1)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


class _Linear:
    def __init__(self, layer: nn.Linear) -> None:
        self.weight, self.bias = _array(layer.weight).T, _array(layer.bias)

    def __call__(self, x: Array) -> Array:
        return x @ self.weight + self.bias


class _Mlp:
    def __init__(self, mlp: nn.Sequential) -> None:
        self.layers = [_Linear(layer) for layer in mlp if isinstance(layer, nn.Linear)]

    def __call__(self, x: Array) -> Array:
        for layer in self.layers[:-1]:
            x = _gelu(layer(x))
        return self.layers[-1](x)


class _Footprint:
    """How much a placed object lowers the logits of all coarse cells."""

    def __init__(self, footprint: Footprint, middles: Array) -> None:
        self.sides = [_Factors(factors, middles) for factors in (footprint.rows, footprint.columns)]
        self.bias = _array(footprint.bias)

    def __call__(self, place: Array, of_place: Array) -> Array:
        """place (2,): row and column, and its waves -> (cells, cells)."""
        rows, columns = (side(at, of_place) for side, at in zip(self.sides, place, strict=True))
        lowered: Array = np.logaddexp(np.float32(0), rows @ columns.T + self.bias)  # softplus
        return lowered


class _Factors:
    """The factors of the coarse rows or columns, given an object's place."""

    def __init__(self, factors: Factors, middles: Array) -> None:
        self.middles = middles
        self.offset, self.hidden, self.out = _Linear(factors.offset), _Linear(factors.hidden), _Linear(factors.out)
        self.line, self.place = _waves(middles) @ _array(factors.line.weight).T, _array(factors.place.weight).T

    def __call__(self, at: np.float32, of_place: Array) -> Array:
        h = self.offset(_waves(self.middles - at)) + self.line + of_place @ self.place
        return self.out(np.maximum(self.hidden(np.maximum(h, 0)), 0))


class _Norm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias, self.eps = _array(norm.weight), _array(norm.bias), norm.eps

    def __call__(self, x: Array) -> Array:
        centred = x - x.sum() / len(x)
        normed: Array = centred / np.sqrt(centred @ centred / len(x) + self.eps)
        return normed * self.weight + self.bias


class _Block:
    """A block on the token of one object, which attends to placed objects and to itself."""

    def __init__(self, block: LayoutBlock) -> None:
        self.norm1, self.norm2, self.mlp = _Norm(block.norm1), _Norm(block.norm2), _Mlp(block.mlp)
        self.qkv, self.out, self.heads = _Linear(block.qkv), _Linear(block.out), block.heads

    def nothing(self) -> Placed:
        empty = np.zeros((0, self.heads, len(self.out.bias) // self.heads), np.float32)
        return empty, empty

    def __call__(self, x: Array, placed: Placed) -> tuple[Array, Placed]:
        """x (D,) -> x (D,), and the keys and values with its own."""
        q, k, v = self.qkv(self.norm1(x)).reshape(3, 1, self.heads, -1)
        keys, values = np.concatenate([placed[0], k]), np.concatenate([placed[1], v])
        scores = (keys * q).sum(-1) / np.sqrt(np.float32(q.shape[-1]))  # (J + 1, heads)
        weights = np.exp(scores - scores.max(0))
        mixed = (weights[..., None] * values).sum(0) / weights.sum(0)[:, None]
        x = x + self.out(mixed.reshape(-1))
        return x + self.mlp(self.norm2(x)), (keys, values)
