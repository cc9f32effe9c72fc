"""Draws positions from the layout network, one object of each picture after the other, in NumPy.

Its numbers are so few that torch's calls take several times as long as their arithmetic. The keys and values of placed
objects are kept, as nothing that comes later changes them. A test compares with the network itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.diffusion.layouts import DRAWS, OUTSIDE, WAVES, Factors, Footprint, LayoutBlock, LayoutNetwork

Array = NDArray[np.float32]
ANGLES = np.pi * 2.0 ** np.arange(WAVES // 2, dtype=np.float32)
ERF_P = np.float32(0.3275911 / 2**0.5)
ERF_A = tuple(np.float32(a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
Placed = tuple[Array, Array]  # keys and values (B, J, heads, D / heads) of placed objects in one block


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
            positions[torch.tensor(which)[:, None], indices] = torch.from_numpy(self(indices.numpy(), own))
        return positions

    def __call__(self, indices: NDArray[np.int64], generators: Sequence[torch.Generator]) -> Array:
        """Draw the positions (B, n, 2) of objects with labels `indices` (B, n), in this order."""
        (B, n), cells = indices.shape, self.cells
        chances, inside = _random(generators, n)
        names = self.names[indices]  # (B, n, D)
        free = names + (self.together(names.sum(1)[:, None]) + self.counts[n])
        placed: list[Placed] = [block.nothing(B) for block in self.blocks]
        places, of_places = np.zeros((B, n, 2), np.float32), np.zeros((B, n, 2 * WAVES), np.float32)  # row, column
        occupied = np.zeros((B, cells, cells), np.float32)
        for j in range(n):
            if j:
                x = names[:, j - 1 : j] + self.position(_waves(places[:, j - 1 : j, ::-1]))
                for b, block in enumerate(self.blocks):
                    x, placed[b] = block(x, placed[b])
                occupied += self.footprint(places[:, j - 1], of_places[:, j - 1])
            h = free[:, j : j + 1]
            for block, before in zip(self.blocks, placed, strict=True):
                h, _ = block(h, before)
            coarse = cast(Array, (self.wanted(self.norm(h)) * self.rows) @ self.columns - occupied)
            known = np.zeros((B, 2), np.float32)
            row = _drawn(_log_sum_exp(coarse), chances[:, j, 0])
            known[:, 0] = row / cells
            for i, terms in enumerate(self.pair, 1):
                so_far = _waves(known)[:, None]  # (B, 1, 2 WAVES)
                logits = coarse[np.arange(B), row] if i == 1 else self.own[i - 2](so_far)[:, 0]
                if j:
                    inputs = [_waves(known[:, None] - places[:, :j]), of_places[:, :j]]
                    inputs.append(np.broadcast_to(so_far, inputs[1].shape))
                    logits = logits + terms(np.concatenate(inputs, -1)).sum(1)
                known[:, i % 2] += _drawn(logits, chances[:, j, i]) / (cells if i < 2 else cells**2)
            places[:, j] = known + inside[:, j] / cells**2
            of_places[:, j] = _waves(places[:, j])
        return places[..., ::-1].copy()


def _random(generators: Sequence[torch.Generator], n: int) -> tuple[NDArray[np.float64], Array]:
    """Return what decides about the cells of n objects (B, n, DRAWS), and about the places in these (B, n, 2)."""
    chances, inside = np.empty((len(generators), n, DRAWS)), np.empty((len(generators), n, 2), np.float32)
    for own, other, generator in zip(chances, inside, generators, strict=True):
        for j in range(n):
            own[j] = torch.rand(DRAWS, generator=generator, dtype=torch.float64)
            other[j] = torch.rand(2, generator=generator)
    return chances, inside


def _drawn(logits: Array, chances: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw a cell from each row of logits (B, C), given numbers in [0, 1): (B,)."""
    odds = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    below = np.cumsum(odds, -1) < (chances * odds.sum(-1))[:, None]
    drawn: NDArray[np.int64] = np.minimum(below.sum(-1), logits.shape[-1] - 1)
    return drawn


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
    """How much an object lowers the logits of all coarse cells, for each of B pictures."""

    def __init__(self, footprint: Footprint, middles: Array) -> None:
        self.sides = [_Factors(factors, middles) for factors in (footprint.rows, footprint.columns)]
        self.bias = _array(footprint.bias)

    def __call__(self, place: Array, of_place: Array) -> Array:
        """place (B, 2): row and column, and its waves -> (B, cells, cells)."""
        rows, columns = (side(at[:, None], of_place[:, None]) for side, at in zip(self.sides, place.T, strict=True))
        lowered: Array = np.logaddexp(np.float32(0), rows @ columns.swapaxes(1, 2) + self.bias)  # softplus
        return lowered


class _Factors:
    """The factors of the coarse rows or columns, given an object's place."""

    def __init__(self, factors: Factors, middles: Array) -> None:
        self.middles = middles
        self.offset, self.hidden, self.out = _Linear(factors.offset), _Linear(factors.hidden), _Linear(factors.out)
        self.line, self.place = _waves(middles) @ _array(factors.line.weight).T, _array(factors.place.weight).T

    def __call__(self, at: Array, of_place: Array) -> Array:
        """at (B, 1), of_place (B, 1, 2 WAVES) -> (B, cells, rank)."""
        h = self.offset(_waves(self.middles - at[:, None])) + self.line + of_place @ self.place
        return self.out(np.maximum(self.hidden(np.maximum(h, 0)), 0))


class _Norm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias, self.eps = _array(norm.weight), _array(norm.bias), norm.eps

    def __call__(self, x: Array) -> Array:
        centred = x - x.sum(-1, keepdims=True) / x.shape[-1]
        normed: Array = centred / np.sqrt(centred @ centred.swapaxes(-1, -2) / x.shape[-1] + self.eps)
        return normed * self.weight + self.bias


class _Block:
    """A block on the token of one object of each picture, which attends to placed objects and to itself."""

    def __init__(self, block: LayoutBlock) -> None:
        self.norm1, self.norm2, self.mlp = _Norm(block.norm1), _Norm(block.norm2), _Mlp(block.mlp)
        self.qkv, self.out, self.heads = _Linear(block.qkv), _Linear(block.out), block.heads

    def nothing(self, pictures: int) -> Placed:
        empty = np.zeros((pictures, 0, self.heads, len(self.out.bias) // self.heads), np.float32)
        return empty, empty

    def __call__(self, x: Array, placed: Placed) -> tuple[Array, Placed]:
        """x (B, 1, D) -> x (B, 1, D), and the keys and values with its own."""
        q, k, v = self.qkv(self.norm1(x)).reshape(len(x), 3, 1, self.heads, -1).swapaxes(0, 1)
        keys, values = np.concatenate([placed[0], k], 1), np.concatenate([placed[1], v], 1)
        scores = (keys * q).sum(-1) / np.sqrt(np.float32(q.shape[-1]))  # (B, J + 1, heads)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        mixed = (weights[..., None] * values).sum(1) / weights.sum(1)[..., None]  # (B, heads, D / heads)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.mlp(self.norm2(x)), (keys, values)
