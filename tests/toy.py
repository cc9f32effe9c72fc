"""A denoiser small enough to calculate by hand, which records its calls."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.diffusion.predictions import PredictionName

K = 4


@dataclass
class Call:
    """The arguments of one network call."""

    t: list[int]
    keep: list[bool]
    labels: list[list[float]]
    autocast: bool


@dataclass
class ToyNetwork:
    """x0_hat = 0.8 tanh(1.5 x + t / 2T + labels . W, where kept), as `prediction`; (B, C, H, W) -> (B, C, H, W)."""

    alpha_bar: Tensor
    prediction: PredictionName = "v"
    image_shape: tuple[int, int, int] = (3, 4, 6)
    num_labels: int = K
    calls: list[Call] = field(default_factory=list)

    def x0(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        weights = torch.tensor([-0.9, 0.4, 0.7, 1.3], dtype=x.dtype)
        shift = t / (2 * len(self.alpha_bar)) + torch.where(keep, (labels * weights).sum(1), 0)
        return 0.8 * torch.tanh(1.5 * x + shift.to(x.dtype)[:, None, None, None])

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        self.calls.append(Call(t.tolist(), keep.tolist(), labels.tolist(), torch.is_autocast_enabled("cpu")))
        ab = self.alpha_bar[t].to(x.dtype)[:, None, None, None]
        x_0 = self.x0(x, t, labels, keep)
        eps = (x - ab.sqrt() * x_0) / (1 - ab).sqrt()
        return {"eps": eps, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x_0, "flow": eps - x_0}[self.prediction]
