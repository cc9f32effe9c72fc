"""A denoiser checkpoint made ready to sample: network, schedule and prediction as its metadata says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from shared.checkpoint import CheckpointError, CheckpointInfo, load
from shared.denoise import Stepper
from shared.device import autocast_dtype
from shared.options import PredictionName
from shared.schedules import alpha_bar
from shared.unet import NetworkConfig, UNet
from shared.vocabulary import Vocabulary


@dataclass
class Denoiser:
    info: CheckpointInfo
    vocabulary: Vocabulary
    network: UNet  # in eval mode
    alpha_bar: Tensor  # (T,) float64
    prediction: PredictionName

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.image_shape

    def stepper(self, *, max_rows: int = 64, pad_to: Sequence[int] | None = None) -> Stepper:
        """A stepping loop on the network's device, in bf16 where the device has it."""
        device = next(self.network.parameters()).device
        return Stepper(
            self.network, self.alpha_bar, self.prediction,
            device=device, dtype=autocast_dtype(device), max_rows=max_rows, pad_to=pad_to,
        )  # fmt: skip


def load_denoiser(path: Path, *, device: str | torch.device = "cpu") -> Denoiser:
    """Raises CheckpointError, with the file's name and the reason, for anything but a whole denoiser checkpoint."""
    info, state = load(path)
    if info.kind != "denoiser":
        raise CheckpointError(path.name, f"holds an {info.kind}, not a denoiser")
    try:
        config = NetworkConfig.model_validate(info.config["network"])
        schedule = alpha_bar(info.config["schedule"], info.config["timesteps"])
        prediction = info.config["prediction"]
        if prediction not in get_args(PredictionName) or config.num_labels != len(info.vocabulary):
            raise ValueError("prediction or number of labels does not fit")
        network = UNet(config)
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]  # torch lists every tensor, on many lines
        raise CheckpointError(path.name, f"configuration and weights do not fit: {reason}") from error
    network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return Denoiser(info, Vocabulary(info.vocabulary), network, schedule, cast(PredictionName, prediction))
