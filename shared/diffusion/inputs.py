"""What a whole picture may be conditioned on beside its labels: the registry of such inputs, and how they are packed.

An input is registered by whoever needs it (`examples/brightness.py`), before a network with it is made or loaded. All
else follows: data sets may have a NAME.json, the network embeds the numbers beside the labels, training drops them for
some pictures, checkpoints name the input, and sampling takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor, nn

from shared.diffusion.layouts import PLACE, ROTATION

if TYPE_CHECKING:
    from shared.diffusion.unet import NetworkConfig


def _linear(numbers: int, embedding: int) -> nn.Module:
    layer = nn.Linear(numbers, embedding)
    nn.init.zeros_(layer.weight)  # a network that starts from one without the input starts as that one
    nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True)
class PictureInput:
    """So many numbers of a picture. `module`: makes the layer (B, numbers + 1) -> (B, E) of the network.

    The layer's last number is 1 where the others are known; where they are not, all are 0.
    """

    numbers: int = 1
    module: Callable[[int, int], nn.Module] = _linear


INPUTS: Final[dict[str, PictureInput]] = {}  # by name, which is also that of the data set's file


def register(name: str, given: PictureInput) -> None:
    """Add an input. ValueError for a name that another one has."""
    if INPUTS.setdefault(name, given) != given:
        raise ValueError(f'there is another input "{name}"')


def width(names: Sequence[str]) -> int:
    """Return how many columns the packed inputs take. ValueError for a name that is not registered."""
    if unknown := [name for name in names if name not in INPUTS]:
        raise ValueError(f'the input "{unknown[0]}" is not registered; import the module that does so')
    return sum(INPUTS[name].numbers + 1 for name in names)


def unknown(names: Sequence[str], *shape: int) -> dict[str, Tensor]:
    """Return inputs that are not known, (*shape, numbers) each."""
    return {name: torch.full((*shape, INPUTS[name].numbers), torch.nan) for name in names}


def with_inputs(labels: Tensor, values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Join picture-wide `values` (..., numbers), NaN where unknown, to what a network is given of labels.

    labels: (..., K), or (..., K, n) with positions. Returns (..., K, n + width): columns that are alike for all labels.
    """
    if not names:
        return labels
    columns = labels if labels.ndim == next(iter(values.values())).ndim + 1 else labels[..., None]
    packed = []
    for name in names:
        known = values[name].isfinite().all(-1, keepdim=True)
        packed += [values[name].nan_to_num(0) * known, known.to(values[name].dtype)]
    joined = torch.cat(packed, -1)[..., None, :].to(labels.device)
    return torch.cat([columns, joined.expand(*columns.shape[:-1], -1)], -1)


class LabelParts(NamedTuple):
    """What a network is given of labels, part by part; None for what it does not take, or was not given."""

    hot: Tensor  # (..., K) multi-hot
    places: Tensor | None = None  # (..., K, 2)
    rotations: Tensor | None = None  # (..., K, 2)
    inputs: Tensor | None = None  # (..., width), packed


def split_labels(labels: Tensor, config: NetworkConfig) -> LabelParts:
    """Take apart what `layouts.with_positions` and `with_inputs` have joined for a network: (..., K, columns).

    Multi-hot labels (B, K) alone are taken, too.
    """
    if labels.ndim == 2:
        return LabelParts(labels)
    return LabelParts(
        labels[..., 0],
        labels[..., PLACE] if config.positions else None,
        labels[..., ROTATION] if config.rotations else None,
        labels[..., 0, -width(config.inputs) :] if config.inputs else None,
    )


class InputEmbedding(nn.Module):
    """The sum of all inputs' embeddings: packed columns (B, width) and keep (B,) -> (B, E)."""

    def __init__(self, names: Sequence[str], embedding: int) -> None:
        super().__init__()
        width(names)  # checks them
        self.sizes = [INPUTS[name].numbers + 1 for name in names]
        self.layers = nn.ModuleDict(
            {name: INPUTS[name].module(size, embedding) for name, size in zip(names, self.sizes, strict=True)}
        )

    def forward(self, packed: Tensor, keep: Tensor) -> Tensor:
        parts = torch.split(packed * keep[:, None], self.sizes, -1)
        return torch.stack([layer(part) for layer, part in zip(self.layers.values(), parts, strict=True)]).sum(0)
