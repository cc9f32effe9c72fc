"""Averages of the weights over training: a short exponential one, the report's, and a long one whose window grows."""

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.config import RunConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


class Averages:
    """Both averages of a network's weights and buffers."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.model, self.start, self.power = model, config.ema_start, config.ema_power
        exponential = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        self.short = AveragedModel(model, multi_avg_fn=exponential, use_buffers=True)
        self.long = AveragedModel(model, multi_avg_fn=self._by_power, use_buffers=True)

    def _by_power(self, averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        """EDM2's power-function average: after n updates beta = (1 - 1/n)^(power + 1) (Karras et al. 2024, eq. 127).

        Its window is a fixed share of the run so far, so short and long runs share one setting.
        """
        n = int(self.long.n_averaged) + 1  # this one is on the CPU; to read the argument is to wait for the device
        beta = (1 - 1 / n) ** (self.power + 1)
        get_ema_multi_avg_fn(beta)(averaged, current, n)  # type: ignore[no-untyped-call]

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
