"""Draws positions from the layout network, one object after the other, in NumPy.

Its numbers are so few that torch's calls take several times as long as their arithmetic. The keys and values of placed
objects are kept, as nothing that comes later changes them. A test compares with the network itself.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.diffusion.layouts import DRAWS, OUTSIDE, WAVES, LayoutNetwork

Array = NDArray[np.float32]
ANGLES = np.pi * 2.0 ** np.arange(WAVES // 2, dtype=np.float32)
ERF_P = np.float32(0.3275911 / 2**0.5)
ERF_A = tuple(np.float32(a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
SIDES = ("footprint.rows", "footprint.columns")
NORM_EPS = np.float32(1e-5)  # of torch's layer norm
Placed = tuple[Array, Array]  # keys and values (J, heads, D / heads) of placed objects in one block


class LayoutDrawer:
    """Draws layouts from a network in eval mode, whose weights must not change afterwards.

    A method that takes a name computes the network's part of that name.
    """

    def __init__(self, network: LayoutNetwork) -> None:
        self.network, self.cells, self.heads = network, network.config.cells, network.config.heads
        self.weights: dict[str, Array] = {name: value.numpy() for name, value in network.state_dict().items()}
        self.middles = (np.arange(self.cells, dtype=np.float32)[:, None] + np.float32(0.5)) / np.float32(self.cells)
        of_middles = _waves(self.middles)
        self.rows, columns = self._mlp("sides.0", of_middles), self._mlp("sides.1", of_middles)  # (cells, K)
        self.columns = columns.T
        self.lines = {side: of_middles @ self.weights[f"{side}.line.weight"].T for side in SIDES}

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
        names = self.weights["label.weight"][indices.numpy()]  # (n, D)
        free = names + self._mlp("together", names.sum(0)) + self.weights["count.weight"][n]
        nothing = np.zeros((0, self.heads, names.shape[1] // self.heads), np.float32)
        placed: list[Placed] = [(nothing, nothing)] * self.network.config.layers
        places, of_places = np.zeros((n, 2), np.float32), np.zeros((n, 2 * WAVES), np.float32)  # row, column
        occupied = np.zeros((cells, cells), np.float32)
        for j in range(n):
            if j:
                x = names[j - 1] + self._mlp("position", _waves(places[j - 1, ::-1]))
                for b, before in enumerate(placed):
                    x, placed[b] = self._block(f"blocks.{b}", x, before)
                occupied += self._footprint(places[j - 1], of_places[j - 1])
            h = free[j]
            for b, before in enumerate(placed):
                h, _ = self._block(f"blocks.{b}", h, before)
            coarse = cast(Array, (self._mlp("wanted", self._norm("norm", h)) * self.rows) @ self.columns - occupied)
            known = np.zeros(2, np.float32)
            row = _draw(_log_sum_exp(coarse), generator)
            known[0] = row / cells
            for i in range(1, DRAWS):
                so_far = _waves(known)
                logits = coarse[row] if i == 1 else self._mlp(f"own.{i - 2}", so_far)
                if j:
                    inputs = [_waves(known - places[:j]), of_places[:j], np.broadcast_to(so_far, (j, len(so_far)))]
                    logits = logits + self._mlp(f"pair.{i - 1}", np.concatenate(inputs, -1)).sum(0)
                known[i % 2] += _draw(logits, generator) / (cells if i < 2 else cells**2)
            places[j] = known + torch.rand(2, generator=generator).numpy() / cells**2
            of_places[j] = _waves(places[j])
        return torch.from_numpy(places[:, ::-1].copy())

    def _linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _mlp(self, name: str, x: Array) -> Array:
        """Linear layers with GELU between them, which counts as a layer."""
        x, layer = self._linear(f"{name}.0", x), 2
        while f"{name}.{layer}.weight" in self.weights:
            x, layer = self._linear(f"{name}.{layer}", _gelu(x)), layer + 2
        return x

    def _norm(self, name: str, x: Array) -> Array:
        centred = x - x.sum() / len(x)
        normed: Array = centred / np.sqrt(centred @ centred / len(x) + NORM_EPS)
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _block(self, name: str, x: Array, placed: Placed) -> tuple[Array, Placed]:
        """Let the token x (D,) of one object attend to placed objects and to itself.

        Returns the new token, and the keys and values with its own.
        """
        q, k, v = self._linear(f"{name}.qkv", self._norm(f"{name}.norm1", x)).reshape(3, 1, self.heads, -1)
        keys, values = np.concatenate([placed[0], k]), np.concatenate([placed[1], v])
        scores = (keys * q).sum(-1) / np.sqrt(np.float32(q.shape[-1]))  # (J + 1, heads)
        weights = np.exp(scores - scores.max(0))
        mixed = (weights[..., None] * values).sum(0) / weights.sum(0)[:, None]
        x = x + self._linear(f"{name}.out", mixed.reshape(-1))
        return x + self._mlp(f"{name}.mlp", self._norm(f"{name}.norm2", x)), (keys, values)

    def _footprint(self, place: Array, of_place: Array) -> Array:
        """Return how much an object at a place (2,), row and column, lowers the logits of all coarse cells."""
        rows, columns = (self._factors(side, at, of_place) for side, at in zip(SIDES, place, strict=True))
        lowered: Array = np.logaddexp(np.float32(0), rows @ columns.T + self.weights["footprint.bias"])  # softplus
        return lowered

    def _factors(self, name: str, at: np.float32, of_place: Array) -> Array:
        """Return the factors of the coarse rows or columns, given an object's place: (cells, K)."""
        h = self._linear(f"{name}.offset", _waves(self.middles - at)) + self.lines[name]
        h = h + of_place @ self.weights[f"{name}.place.weight"].T
        return self._linear(f"{name}.out", np.maximum(self._linear(f"{name}.hidden", np.maximum(h, 0)), 0))


def _draw(logits: Array, generator: torch.Generator) -> int:
    odds = np.exp(logits.astype(np.float64) - logits.max())
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    return min(int(np.searchsorted(np.cumsum(odds), u * odds.sum())), len(logits) - 1)


def _log_sum_exp(x: Array) -> Array:
    """Return the logarithm of the sum of exp(x) over the last axis."""
    most = x.max(-1)
    found: Array = np.log(np.exp(x - most[..., None]).sum(-1)) + most
    return found


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
