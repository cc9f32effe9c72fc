"""Averages of the weights over training.

The denoiser has two: a short exponential one, the report's, and a long one whose window grows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.config import TrainConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def power_average(power: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """EDM2's power-function average: after n updates beta = (1 - 1/n)^(power + 1) (Karras et al. 2024, eq. 127).

    Its window is a fixed share of the run so far, so short and long runs share one setting.
    """

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        beta = (1 - 1 / (float(updates) + 1)) ** (power + 1)
        torch._foreach_lerp_(averaged, current, 1 - beta)

    return update


def warmed_up_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Return an exponential average with less decay at first, so that a short run forgets the random weights."""

    def update(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, updates)  # type: ignore[no-untyped-call]

    return update


class Averages:
    """Both averages of a denoiser's weights."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model, self.start = model, config.ema_start
        exponential = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        self.short = AveragedModel(model, multi_avg_fn=exponential)
        self.long = AveragedModel(model, multi_avg_fn=power_average(config.ema_power))

    def update(self, step: int) -> None:
        self.long.update_parameters(self.model)
        if step >= self.start:
            self.short.update_parameters(self.model)

    def network(self, kind: str) -> nn.Module:
        """Return the network with the weights of `kind`: long, short (the raw ones before its first step) or raw."""
        if kind == "raw" or (kind == "short" and self.short.n_averaged == 0):
            return self.model
        return (self.long if kind == "long" else self.short).module

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"short": self.short.state_dict(), "long": self.long.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.short.load_state_dict(state["short"])
        self.long.load_state_dict(state["long"])
