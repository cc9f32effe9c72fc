"""The path from pictures to noise, and what a network says about a place on it. Knows no solver and no network.

One object for the schedule and the prediction, which belong together: training noises pictures with it, sampling finds
x_0 with it, and so do distillation and the upsampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from shared.diffusion.predictions import PredictionName, Shares, ToX0, shares, to_x0
from shared.diffusion.schedules import ScheduleName
from shared.diffusion.schedules import alpha_bar as make_alpha_bar


@dataclass(frozen=True, eq=False)
class NoisePath:
    """x_t = signal x_0 + noise eps by timestep, from 0 (least noise) to T - 1, and what the network predicts of it.

    signal^2 = alpha_bar and signal^2 + noise^2 = 1: any other Gaussian path is such a one, once x_t is divided by
    sqrt(signal^2 + noise^2). That is the scale at which the network sees x_t. So flow matching's straight path is here,
    too (`schedules.py`), and no solver needs to know which path it is on.
    """

    alpha_bar: Tensor  # (T,) float64, descending
    prediction: PredictionName

    @classmethod
    def of(cls, schedule: ScheduleName, timesteps: int, prediction: PredictionName) -> NoisePath:
        """Return the path of a schedule's name. KeyError for a name that there is not."""
        return cls(make_alpha_bar(schedule, timesteps), prediction)

    def __len__(self) -> int:
        """Return the number of timesteps T."""
        return len(self.alpha_bar)

    @cached_property
    def signal(self) -> Tensor:
        """How much of x_0 is in x_t, (T,) float64."""
        return self.alpha_bar.sqrt()

    @cached_property
    def noise(self) -> Tensor:
        """How much of eps is in x_t, (T,) float64."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def target(self) -> Shares:
        """How much of x_0 and of eps is in what the network predicts, (T,) float64 each."""
        return shares(self.alpha_bar, self.prediction)

    @cached_property
    def to_x0(self) -> ToX0:
        """How x_0 follows from x_t and the prediction."""
        return to_x0(self.alpha_bar, self.prediction)

    def noised(self, x_0: Tensor, eps: Tensor, t: int) -> Tensor:
        """Return x_t (Ho et al. 2020, eq. 4)."""
        return float(self.signal[t]) * x_0 + float(self.noise[t]) * eps
