"""Noise schedules: betas and alpha_bar in float64, index i is timestep i, from 0 (least noise) to T - 1.

Knows neither samplers nor networks.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shared.options import ScheduleName

BETA_MIN, BETA_MAX = 1e-4, 0.02  # Ho et al. 2020, section 4; the report keeps them for all but cosine
COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021, eq. 17: keeps beta_0 from vanishing
COSINE_BETA_CLIP = 0.999  # Nichol & Dhariwal 2021, section 3.2: "no larger than 0.999"


def _linear(T: int) -> Tensor:
    """beta_t on a line from 1e-4 to 0.02 (Ho et al. 2020, section 4)."""
    return torch.linspace(BETA_MIN, BETA_MAX, T, dtype=torch.float64)


def _quadratic(T: int) -> Tensor:
    """sqrt(beta_t) on a line, so that less noise comes early than on the line (the "quad" of Ho et al.'s code)."""
    return torch.linspace(BETA_MIN**0.5, BETA_MAX**0.5, T, dtype=torch.float64) ** 2


def _sigmoid(T: int) -> Tensor:
    """beta_t on a logistic curve over -6..6, scaled to 1e-4..0.02 (Xu et al. 2022, GeoDiff; the report's fourth)."""
    return torch.sigmoid(torch.linspace(-6.0, 6.0, T, dtype=torch.float64)) * (BETA_MAX - BETA_MIN) + BETA_MIN


def _cosine(T: int) -> Tensor:
    """beta_t = 1 - f(t + 1) / f(t) with f(t) = cos^2((t / T + s) / (1 + s) pi / 2) (Nichol & Dhariwal 2021, eq. 17).

    Why the report's cosine run failed. It clips beta at 0.9999 and steps by
    x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(1 - beta_t) + sqrt(beta_t) z. At t = 999 of
    T = 1000 the raw beta is 1, the clip binds, and alpha_bar is 2.4e-10 (linear ends at 4.0e-5). The step then is
    100.0 x - 99.99 eps_hat + z: a picture of deviation 1 is to come out as the difference of two of deviation 100, so
    3 % of error in eps_hat is noise of deviation 3, three times what the next step was trained on. There eps_hat is
    wrong altogether, and nothing pulls back: 1 / sqrt(1 - beta) goes on with 2.0, 1.5, 1.33, 1.25, that is 300 over
    the last three steps, 500 over five, 1000 over ten, 64,000 over all. A clip at 0.999 alone still leaves 31.6 and 95.

    What makes ours work. The samplers write the same step with x0_hat, and in x0_hat it is tame: at t = 999,
    x_{t-1} = 0.032 x + 0.0016 x0_hat + z. A v prediction gives x0_hat = sqrt(alpha_bar) x - sqrt(1 - alpha_bar) v,
    which amplifies nothing. An eps prediction divides by sqrt(alpha_bar), 20,000 at t = 999 and 640 at t = 998; there
    `denoise.py` holds x0_hat to [-1, 1], the range of a picture, at exactly the five timesteps that are noisier than
    any other schedule gets. The clip is Nichol & Dhariwal's 0.999, which leaves alpha_bar_999 = 2.4e-9 above zero, as
    the logarithm of the signal-to-noise ratio needs.
    """
    u = (torch.arange(T + 1, dtype=torch.float64) / T + COSINE_OFFSET) / (1 + COSINE_OFFSET)
    f = torch.cos(u * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=COSINE_BETA_CLIP)


SCHEDULES: dict[ScheduleName, Callable[[int], Tensor]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
}


def betas(name: ScheduleName, T: int = 1000) -> Tensor:
    """The variances beta_t of the forward steps: float64 (T,), each within (0, 1)."""
    return SCHEDULES[name](T)


def alpha_bar(name: ScheduleName, T: int = 1000) -> Tensor:
    """alpha_bar_t = prod_{i <= t} (1 - beta_i): float64 (T,), falling; x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps."""
    return torch.cumprod(1 - betas(name, T), dim=0)
