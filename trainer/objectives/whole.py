"""What a checkpoint takes over from the denoiser that it was made from: a model is one file, which needs no other."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from shared.diffusion.layouts import LAYOUTS
from shared.diffusion.model import UPSAMPLER, Denoiser
from shared.diffusion.upsampler import UpsamplerConfig

OTHERS: Final = ("base", "upsampler", "picture")  # fields that describe what a new checkpoint does not take over


def weights_of(denoiser: Denoiser) -> dict[str, Tensor]:
    """Return the weights of a denoiser and of its layout network, by their names in a checkpoint."""
    layouts = {} if denoiser.layouts is None else denoiser.layouts.network.state_dict()
    return {**denoiser.network.state_dict(), **{LAYOUTS + key: value for key, value in layouts.items()}}


def config_of(denoiser: Denoiser) -> dict[str, Any]:
    """Return a denoiser's configuration, without its upsampler's."""
    return {key: value for key, value in denoiser.info.config.items() if key not in OTHERS}


def upsampler_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an upsampler's state dict by its names in a checkpoint."""
    return {UPSAMPLER + key: value for key, value in weights.items()}


def upsampler_config(config: UpsamplerConfig) -> dict[str, Any]:
    """Return what describes an upsampler in a checkpoint."""
    return {"picture": list(config.picture), "upsampler": config.model_dump(mode="json")}
