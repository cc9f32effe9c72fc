"""Samplers as tables: all that a solver does in a step is linear, so it is computed here once, in float64.

Sees neither labels nor network nor guidance: those come before, in `denoise.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shared.options import SamplerName, SamplingOptions, SpacingName

# Where the noisy end of the log-SNR grid is held: 2 lambda with lambda = -5.1, as the code of Lu et al. does. Cosine's
# last timesteps reach -19.8, so that a third of an unheld grid would lie within a handful of timesteps of pure noise.
LOG_SNR_MIN = -10.2


@dataclass(frozen=True, eq=False)
class Table:
    """A sampler's coefficients, a row per step: x_next = a x + b x0_hat + c x0_hat_previous + s z, z ~ N(0, I)."""

    t: Tensor  # (S,) int64, falling: the timestep at which the network is called
    a: Tensor  # (S,) float64, and so are the rest
    b: Tensor  # (S,)
    c: Tensor  # (S,), zero in row 0, where there is no previous x0_hat
    s: Tensor  # (S,), zero in the last row

    @cached_property
    def rows(self) -> list[tuple[int, float, float, float, float]]:
        """(t, a, b, c, s) of each step as Python numbers, which the stepping loop gathers from."""
        columns = (column.tolist() for column in (self.t, self.a, self.b, self.c, self.s))
        return list(zip(*columns, strict=True))

    def __len__(self) -> int:
        return len(self.t)


def _distinct(t: Tensor, T: int) -> Tensor:
    """The nearest falling sequence of distinct timesteps that starts at T - 1 and stays at or above 0. (S,) -> (S,)"""
    steps = len(t)
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps asked, but the schedule has {T} timesteps; allowed are 1 to {T}")
    chosen, above = [], T
    for i, wanted in enumerate(t.tolist()):
        above = T - 1 if i == 0 else max(min(int(wanted), above - 1), steps - 1 - i)
        chosen.append(above)
    return torch.tensor(chosen, dtype=torch.int64)


def _uniform(steps: int, alpha_bar: Tensor) -> Tensor:
    """Equal distances in t; T - 1 steps are all but t = 0, as the report takes them."""
    return torch.linspace(len(alpha_bar) - 1, 0, steps + 1, dtype=torch.float64)[:-1].round()


def _trailing(steps: int, alpha_bar: Tensor) -> Tensor:
    """Equal distances in t, counted from the end (Lin et al. 2024, table 2)."""
    T = len(alpha_bar)
    return (T - torch.arange(steps, dtype=torch.float64) * T / steps).round() - 1


def _logsnr(steps: int, alpha_bar: Tensor) -> Tensor:
    """Equal distances in log(alpha_bar / (1 - alpha_bar)), each rounded to the nearest timestep (Lu et al. 2022)."""
    log_snr = torch.logit(alpha_bar)  # (T,), falling
    start = max(float(log_snr[-1]), LOG_SNR_MIN)
    wanted = torch.linspace(start, float(log_snr[0]), steps + 1, dtype=torch.float64)[:-1]
    return (log_snr[None, :] - wanted[:, None]).abs().argmin(dim=1)


def ddpm(t: Tensor, alpha_bar: Tensor, *, small: bool = False) -> Table:
    """Ancestral sampling with sigma^2 = beta, or the posterior variance if `small`.

    Ho et al. 2020, eq. 7 and algorithm 2. On a subsequence, beta_t stands for 1 - alpha_bar_t / alpha_bar_next. The
    last row adds no noise. It lands on x0_hat, but for a sequence that ends at t = 1: there it takes the algorithm's
    own step to t = 0 and stops, as the report's loop over range(1, T) does (the noise left has deviation 0.007).
    """
    ab, ab_next = _levels(t, alpha_bar)
    if t[-1] == 1:
        ab_next[-1] = alpha_bar[0]
    beta = 1 - ab / ab_next
    a = (ab / ab_next).sqrt() * (1 - ab_next) / (1 - ab)
    b = ab_next.sqrt() * beta / (1 - ab)
    s = ((1 - ab_next) / (1 - ab) * beta).sqrt() if small else beta.sqrt()
    s[-1] = 0
    return Table(t, a, b, torch.zeros_like(a), s)


def ddim(t: Tensor, alpha_bar: Tensor, *, eta: float = 0.0) -> Table:
    """DDIM (Song et al. 2021, eq. 12 and 16), eta = 0 deterministic, 1 ancestral with the posterior variance.

    With eta = 0 it is also Euler's method and DPM-Solver++ 1, to the last coefficient. Euler, on x / sqrt(ab) with
    sigma = sqrt((1 - ab) / ab) (Karras et al. 2022, algorithm 1 without its correction), gives
    a = sqrt(ab_next / ab) sigma_next / sigma and b = sqrt(ab_next) (1 - sigma_next / sigma). DPM-Solver++ 1 (Lu et al.
    2022, section 4, k = 1) gives a = sqrt((1 - ab_next) / (1 - ab)) and b = sqrt(ab_next) (1 - exp(-h)), where
    exp(-h) = sigma_next / sigma: the same.
    """
    ab, ab_next = _levels(t, alpha_bar)
    s = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt()
    a = ((1 - ab_next - s**2).clamp(min=0) / (1 - ab)).sqrt()
    return Table(t, a, ab_next.sqrt() - a * ab.sqrt(), torch.zeros_like(a), s)


def dpmpp_2m(t: Tensor, alpha_bar: Tensor, *, sde: bool = False) -> Table:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), and if `sde` the same paper's SDE-DPM-Solver++ 2M.

    D = (1 + 1 / 2r) x0_hat - 1 / 2r x0_hat_previous, r = h_previous / h, in steps h of lambda = log(alpha / sigma).
    First order in the first row, which has nothing to look back on, and in the last, where h is infinite.
    """
    ab, ab_next = _levels(t, alpha_bar)
    lambda_, lambda_next = torch.logit(ab) / 2, torch.logit(ab_next) / 2  # the last of lambda_next is infinite
    h = lambda_next - lambda_
    decay = torch.exp(-h)  # sigma_next alpha / (sigma alpha_next)
    a = ((1 - ab_next) / (1 - ab)).sqrt()
    half = torch.zeros_like(h)  # 1 / 2r
    half[1:-1] = h[1:-1] / h[:-2] / 2
    if sde:
        a, weight, s = a * decay, ab_next.sqrt() * (1 - decay**2), ((1 - ab_next) * (1 - decay**2)).sqrt()
    else:
        weight, s = ab_next.sqrt() * (1 - decay), torch.zeros_like(h)
    return Table(t, a, weight * (1 + half), -weight * half, s)


def _levels(t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_bar at each step and at the one it leads to; the last leads to the picture itself, 1. (S,) -> (S,), (S,)"""
    ab = alpha_bar[t]
    return ab, torch.cat([ab[1:], ab.new_ones(1)])


SPACINGS: dict[SpacingName, Callable[[int, Tensor], Tensor]] = {
    "uniform": _uniform,
    "logsnr": _logsnr,
    "trailing": _trailing,
}
SAMPLERS: dict[SamplerName, Callable[[Tensor, Tensor, SamplingOptions], Table]] = {
    "ddpm": lambda t, ab, _: ddpm(t, ab),
    "ddpm_small": lambda t, ab, _: ddpm(t, ab, small=True),
    "ddim": lambda t, ab, options: ddim(t, ab, eta=options.eta),
    "euler": lambda t, ab, _: ddim(t, ab),
    "dpmpp_1": lambda t, ab, _: ddim(t, ab),
    "dpmpp_2m": lambda t, ab, _: dpmpp_2m(t, ab),
    "sde_dpmpp_2m": lambda t, ab, _: dpmpp_2m(t, ab, sde=True),
}


def timesteps(spacing: SpacingName, steps: int, alpha_bar: Tensor) -> Tensor:
    """Distinct falling timesteps, the first T - 1: int64 (steps,). Raises ValueError for more steps than T."""
    return _distinct(SPACINGS[spacing](steps, alpha_bar), len(alpha_bar))


def make_table(options: SamplingOptions, alpha_bar: Tensor) -> Table:
    """The table of these options on this schedule, alpha_bar (T,) float64. Raises ValueError for more steps than T."""
    return SAMPLERS[options.sampler](timesteps(options.spacing, options.steps, alpha_bar), alpha_bar, options)
