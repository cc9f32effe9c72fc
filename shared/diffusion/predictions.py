"""What a network predicts, and how x_0 follows from it. One entry of PREDICTIONS is all that a new prediction needs:
the training target, the loss weights, sampling and distillation follow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from shared.diffusion.schedules import ScheduleName

PredictionName = Literal["eps", "v", "flow"]
# Where an error of the prediction becomes more than 160 times as large in x0_hat, x0_hat is clamped to [-1, 1], the
# range of a picture. For eps that is where alpha_bar is below 3.91e-5. The linear (4.04e-5), quadratic and sigmoid
# (3.97e-5) schedules stay above it; cosine's last five timesteps are below. `schedules.py` explains why.
MOST_AMPLIFIED: Final = 160.0
EPS_BOUNDED_BELOW: Final = 1 / (1 + MOST_AMPLIFIED**2)

Shares = tuple[Tensor, Tensor]
# Name -> how much of x_0 and of eps is in the prediction, given a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar)
PREDICTIONS: Final[dict[PredictionName, Callable[[Tensor, Tensor], Shares]]] = {
    "eps": lambda a, s: (torch.zeros_like(a), torch.ones_like(s)),  # Ho et al. 2020, eq. 14
    "v": lambda a, s: (-s, a),  # Salimans & Ho 2022, appendix D
    "flow": lambda a, s: (-torch.ones_like(a), torch.ones_like(s)),  # eps - x_0, the velocity: Liu et al. 2022, eq. 1
}
# the schedule that a prediction is made for, where a run names none
OWN_SCHEDULES: Final[dict[PredictionName, ScheduleName]] = {"flow": "flow"}
# how x_0 follows from each, for readers of an exported file
IN_WORDS: Final[dict[PredictionName, str]] = {
    "eps": "x_0 = (x_t - sqrt(1 - alpha_bar[t]) prediction) / sqrt(alpha_bar[t]), "
    f"clamped to [-1, 1] where alpha_bar[t] < {EPS_BOUNDED_BELOW:g}",
    "v": "x_0 = sqrt(alpha_bar[t]) x_t - sqrt(1 - alpha_bar[t]) prediction",
    "flow": "x_0 = (x_t - sqrt(1 - alpha_bar[t]) prediction) / (sqrt(alpha_bar[t]) + sqrt(1 - alpha_bar[t]))",
}


@dataclass(frozen=True)
class ToX0:
    """Coefficients of x0_hat = p x_t + q prediction, clamped to +-limit, by timestep: (T,) float64 each."""

    p: Tensor
    q: Tensor
    limit: Tensor  # infinite except where `q` is very large

    def rows(self) -> list[tuple[float, float, float]]:
        """Return (p, q, limit) of each timestep."""
        return list(zip(self.p.tolist(), self.q.tolist(), self.limit.tolist(), strict=True))

    def to(self, device: torch.device) -> "ToX0":
        """Return the coefficients in float32 on a device."""
        return ToX0(*(one.float().to(device) for one in (self.p, self.q, self.limit)))

    def __call__(self, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Return x0_hat of pictures x (B, C, H, W) at timesteps t (B,), as `Stepper` does."""
        p, q, limit = (one[t][:, None, None, None] for one in (self.p, self.q, self.limit))
        return (p * x + q * prediction).clamp(-limit, limit)


def shares(alpha_bar: Tensor, prediction: PredictionName) -> Shares:
    """Return how much of x_0 and of eps is in the prediction at each timestep: alpha_bar (T,) -> (T,) float64 each."""
    alpha_bar = alpha_bar.double()
    return PREDICTIONS[prediction](alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def to_x0(alpha_bar: Tensor, prediction: PredictionName) -> ToX0:
    """Solve x_t = a x_0 + s eps and prediction = u x_0 + w eps for x_0. alpha_bar: (T,)."""
    a, s = alpha_bar.double().sqrt(), (1 - alpha_bar.double()).sqrt()
    u, w = shares(alpha_bar, prediction)
    p, q = w / (w * a - u * s), -s / (w * a - u * s)
    return ToX0(p, q, torch.where(q.abs() > MOST_AMPLIFIED, 1.0, torch.inf))
