"""Noise schedules: beta and alpha_bar in float64, by timestep from 0 (least noise) to T - 1.

Knows neither samplers nor networks.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

ScheduleName = Literal["linear", "quadratic", "cosine", "sigmoid", "flow"]
BETA_MIN, BETA_MAX = 1e-4, 0.02  # Ho et al. 2020, section 4; the course report uses them for all but cosine
BETAS_OF = 1000  # the number of timesteps that these are for
COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021, eq. 17: keeps beta_0 above zero
BETA_CLIP = 0.999  # Nichol & Dhariwal 2021, section 3.2: "no larger than 0.999"


def _scaled(beta: Tensor) -> Tensor:
    """Return (T,) betas that add up to as much noise as the given ones do over 1,000 timesteps.

    Nichol & Dhariwal's code scales by 1000 / T: with fewer timesteps the last would otherwise be a picture, not noise.
    """
    return (beta * (BETAS_OF / len(beta))).clamp(max=BETA_CLIP)


def _linear(T: int) -> Tensor:
    """Return beta_t, linear in t from 1e-4 to 0.02 (Ho et al. 2020, section 4)."""
    return _scaled(torch.linspace(BETA_MIN, BETA_MAX, T, dtype=torch.float64))


def _quadratic(T: int) -> Tensor:
    """Return beta_t whose square root is linear in t: less early noise than linear (the "quad" of Ho et al.'s code)."""
    return _scaled(torch.linspace(BETA_MIN**0.5, BETA_MAX**0.5, T, dtype=torch.float64) ** 2)


def _sigmoid(T: int) -> Tensor:
    """Return beta_t on a logistic curve over -6..6, scaled to 1e-4..0.02 (GeoDiff, Xu et al. 2022)."""
    curve = torch.sigmoid(torch.linspace(-6.0, 6.0, T, dtype=torch.float64))
    return _scaled(curve * (BETA_MAX - BETA_MIN) + BETA_MIN)


def _cosine(T: int) -> Tensor:
    """Return beta_t = 1 - f(t + 1) / f(t), f(t) = cos^2((t / T + s) / (1 + s) pi / 2) (Nichol & Dhariwal 2021, eq. 17).

    The course report's cosine run failed because it clips beta at 0.9999 and steps with eps_hat: at t = 999 of 1000 the
    step is 100.0 x - 99.99 eps_hat + z, which turns an error of 3 % in eps_hat into noise of deviation 3, and the next
    steps amplify that further: by 500 over five of them, by 64,000 over all.

    Our samplers write the same step with x0_hat, whose coefficients are small: 0.032 x + 0.0016 x0_hat + z. A v
    prediction amplifies nothing on the way to x0_hat. An eps prediction divides by sqrt(alpha_bar), a factor of 20,000
    at t = 999, so `denoise.py` clamps x0_hat to [-1, 1] at the five timesteps that are noisier than in any other
    schedule. The clip at 0.999 keeps alpha_bar_999 above zero, as the logarithm of the signal-to-noise ratio requires.
    """
    u = (torch.arange(T + 1, dtype=torch.float64) / T + COSINE_OFFSET) / (1 + COSINE_OFFSET)
    f = torch.cos(u * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=BETA_CLIP)


def _flow(T: int) -> Tensor:
    """Return beta_t of the straight path (1 - u) x_0 + u eps, u = (t + 1/2) / T (Liu et al. 2022; Lipman et al. 2023).

    Divided by sqrt((1 - u)^2 + u^2), which `path.py` explains, so alpha_bar = (1 - u)^2 / ((1 - u)^2 + u^2). DDIM's
    step on the divided path is Euler's on the straight one.
    """
    u = (torch.arange(T, dtype=torch.float64) + 0.5) / T
    alpha_bar = (1 - u) ** 2 / ((1 - u) ** 2 + u**2)
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


SCHEDULES: dict[ScheduleName, Callable[[int], Tensor]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
    "flow": _flow,
}


def betas(name: ScheduleName, T: int = 1000) -> Tensor:
    """Return the variances beta_t of the forward steps: float64 (T,), each within (0, 1)."""
    return SCHEDULES[name](T)


def alpha_bar(name: ScheduleName, T: int = 1000) -> Tensor:
    """Return alpha_bar_t = prod_{i <= t} (1 - beta_i), float64 (T,), descending: x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps.

    Ho et al. 2020, eq. 4.
    """
    return torch.cumprod(1 - betas(name, T), dim=0)
