"""A denoiser checkpoint made ready to sample: network, schedule and prediction as its metadata says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast, get_args

import torch
from torch import Tensor

from shared.checkpoint import SUFFIX, CheckpointError, CheckpointInfo, base_problem, load
from shared.device import autocast_dtype
from shared.diffusion.denoise import Stepper
from shared.diffusion.layouts import Layouts
from shared.diffusion.packed import can_pack, pack
from shared.diffusion.schedules import alpha_bar
from shared.diffusion.unet import NetworkConfig, UNet
from shared.options import PredictionName, SamplingOptions, default_options
from shared.storage import Location
from shared.vocabulary import Vocabulary


@dataclass
class Denoiser:
    info: CheckpointInfo
    vocabulary: Vocabulary
    network: UNet  # in eval mode
    alpha_bar: Tensor  # (T,) float64
    prediction: PredictionName
    layouts: Layouts | None  # where objects are put, of a network that is told positions
    options: SamplingOptions  # how it is sampled where nothing else is asked
    aspect: float = 1.0  # width over height of its pictures before they were padded to squares; 1 where squeezed

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.image_shape

    def stepper(self, *, max_rows: int = 64, pad_to: Sequence[int] | None = None) -> Stepper:
        """A stepping loop on the network's device, in bf16 where the device has it."""
        device = next(self.network.parameters()).device
        dtype = autocast_dtype(device)
        return Stepper(
            self._packed if can_pack(device, dtype) else self.network, self.alpha_bar, self.prediction,
            device=device, dtype=dtype, max_rows=max_rows, pad_to=pad_to, layouts=self.layouts,
        )  # fmt: skip

    @cached_property
    def _packed(self) -> UNet:
        return pack(self.network)


def load_denoiser(path: Location, *, device: str | torch.device = "cpu") -> Denoiser:
    """Raises CheckpointError, with the file's name and the reason, for anything but a whole denoiser checkpoint."""
    info, state = load(path)
    if info.kind != "denoiser":
        raise CheckpointError(path.name, f"holds an {info.kind}, not a denoiser")
    if info.config.get("base"):
        state = adapt(_base_weights(path, info), state)
    try:
        config = NetworkConfig.model_validate(info.config["network"])
        schedule = alpha_bar(info.config["schedule"], info.config["timesteps"])
        prediction = info.config["prediction"]
        options, aspect = default_options(info.config), float(info.config.get("aspect", 1.0))
        if prediction not in get_args(PredictionName) or config.num_labels != len(info.vocabulary):
            raise ValueError("prediction or number of labels does not fit")
        if not 0 < aspect < math.inf:
            raise ValueError(f"aspect {aspect} is no ratio of sides")
        layouts = Layouts(state.pop("layouts").float()) if config.positions else None
        network = UNet(config)
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]  # torch lists every tensor, on many lines
        raise CheckpointError(path.name, f"configuration and weights do not fit: {reason}") from error
    network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    vocabulary, known = Vocabulary(info.vocabulary), cast(PredictionName, prediction)
    return Denoiser(info, vocabulary, network, schedule, known, layouts, options, aspect)


def _base_weights(path: Location, adapter: CheckpointInfo) -> dict[str, Tensor]:
    """The weights that an adapter checkpoint at `path` changes, from the same folder."""
    name = adapter.config["base"]["name"]
    try:
        base, weights = load(path.with_name(name + SUFFIX))
    except CheckpointError as error:
        raise CheckpointError(path.name, f"changes {name}, which cannot be loaded: {error.reason}") from error
    if problem := base_problem(adapter, base):
        raise CheckpointError(path.name, problem)
    return weights


def adapt(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with changes: NAME.up @ NAME.down to a matrix (LoRA, Hu et al. 2022, eq. 3), NAME to anything else."""
    changed = {}
    for name, weight in weights.items():
        if f"{name}.up" in changes:
            weight = weight.float() + changes[f"{name}.up"].float() @ changes[f"{name}.down"].float()
        elif name in changes:
            weight = weight.float() + changes[name].float()
        changed[name] = weight
    return changed
