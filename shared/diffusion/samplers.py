"""Samplers as tables: a solver's step is linear, so its coefficients are computed once, in float64.

Sees neither labels nor network nor guidance; `denoise.py` applies those before the table's step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shared.diffusion.schedules import BETAS_OF
from shared.options import SamplerName, SamplingOptions, SpacingName

# The noisy end of the log-SNR grid: 2 lambda with lambda = -5.1, as in the code of Lu et al. Without this limit a third
# of the grid would fall on cosine's last few timesteps of almost pure noise, which reach -19.8.
LOG_SNR_MIN = -10.2
REPORTS_LOOP = list(range(BETAS_OF - 1, 0, -1))  # the timesteps of the course report's loop, over range(1, T)


@dataclass(frozen=True, eq=False)
class Table:
    """A sampler's coefficients, a row for each call of the network, which is a step everywhere else.

    x_next = a x + b x0_hat + c x0_hat_previous + s z, z ~ N(0, I).
    """

    t: Tensor  # (S,) int64, never ascending: the timestep at which the network is called
    a: Tensor  # (S,) float64, like b, c and s
    b: Tensor  # (S,)
    c: Tensor  # (S,), zero in row 0, where there is no previous x0_hat
    s: Tensor  # (S,), zero in the last row

    @cached_property
    def rows(self) -> list[tuple[int, float, float, float, float]]:
        """(t, a, b, c, s) of each step as Python numbers, for the stepping loop."""
        columns = (column.tolist() for column in (self.t, self.a, self.b, self.c, self.s))
        return list(zip(*columns, strict=True))

    def __len__(self) -> int:
        return len(self.t)


def _distinct(t: Tensor, T: int) -> Tensor:
    """Return the nearest strictly descending timesteps from T - 1 down to at least 0: (S,) -> (S,). ValueError."""
    steps = len(t)
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps requested, but the schedule has {T} timesteps; allowed are 1 to {T}")
    chosen, above = [], T
    for i, wanted in enumerate(t.tolist()):
        above = T - 1 if i == 0 else max(min(int(wanted), above - 1), steps - 1 - i)
        chosen.append(above)
    return torch.tensor(chosen, dtype=torch.int64)


def _uniform(steps: int, alpha_bar: Tensor) -> Tensor:
    """Return timesteps at equal distances in t. T - 1 steps are all but t = 0, as in the course report."""
    return torch.linspace(len(alpha_bar) - 1, 0, steps + 1, dtype=torch.float64)[:-1].round()


def _trailing(steps: int, alpha_bar: Tensor) -> Tensor:
    """Return timesteps at equal distances in t, counted from the end (Lin et al. 2024, table 2)."""
    T = len(alpha_bar)
    return (T - torch.arange(steps, dtype=torch.float64) * T / steps).round() - 1


def _logsnr(steps: int, alpha_bar: Tensor) -> Tensor:
    """Return timesteps nearest to equal distances in log(alpha_bar / (1 - alpha_bar)) (Lu et al. 2022)."""
    log_snr = torch.logit(alpha_bar)  # (T,), descending
    start = max(float(log_snr[-1]), LOG_SNR_MIN)
    wanted = torch.linspace(start, float(log_snr[0]), steps + 1, dtype=torch.float64)[:-1]
    return (log_snr[None, :] - wanted[:, None]).abs().argmin(dim=1)


def ddpm(t: Tensor, alpha_bar: Tensor, *, small: bool = False) -> Table:
    """Ancestral sampling with sigma^2 = beta, or the posterior variance if `small`.

    Ho et al. 2020, eq. 7 and algorithm 2. On a subsequence, beta_t is 1 - alpha_bar_t / alpha_bar_next. The last row
    adds no noise and ends at x0_hat. REPORTS_LOOP is the exception, with sigma^2 = beta as in the course report: its
    last step, at t = 1, goes to t = 0 and leaves noise of a deviation of about 0.007, a level of 256.
    """
    ab, ab_next = _levels(t, alpha_bar)
    if not small and len(alpha_bar) == BETAS_OF and t.tolist() == REPORTS_LOOP:
        ab_next[-1] = alpha_bar[0]
    beta = 1 - ab / ab_next
    a = (ab / ab_next).sqrt() * (1 - ab_next) / (1 - ab)
    b = ab_next.sqrt() * beta / (1 - ab)
    s = ((1 - ab_next) / (1 - ab) * beta).sqrt() if small else beta.sqrt()
    s[-1] = 0
    return Table(t, a, b, torch.zeros_like(a), s)


def ddim(t: Tensor, alpha_bar: Tensor, *, eta: float = 0.0) -> Table:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic with eta = 0, ancestral with the posterior variance with 1.

    With eta = 0 it is identical to Euler's method and to DPM-Solver++ 1. Euler, on x / sqrt(ab) with
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
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), or SDE-DPM-Solver++ 2M of the same paper if `sde`.

    D = (1 + 1 / 2r) x0_hat - 1 / 2r x0_hat_previous, r = h_previous / h, in steps h of lambda = log(alpha / sigma).
    First order in the first row, which has no previous x0_hat, and in the last, where h is infinite.
    """
    ab, ab_next = _levels(t, alpha_bar)
    lambda_, lambda_next = torch.logit(ab) / 2, torch.logit(ab_next) / 2  # the last lambda_next is infinite
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


def heun(t: Tensor, alpha_bar: Tensor, *, calls: int) -> Table:
    """Heun's method (Karras et al. 2022, algorithm 1) on x / sqrt(ab): a step has two rows, the last step only one.

    The first row is Euler's step. The second, at the next timestep, replaces the slope by the mean of the slopes at
    both. Both slopes are (x - x0_hat) / sigma_next at Euler's x, as its step is straight, so the first x is not needed:
    x_next = x + sqrt(ab_next) (sigma / sigma_next - 1) / 2 (x0_hat - x0_hat_previous).

    `calls`: how many rows there are, 2 len(t) - 1, or one fewer: then the last step but one has no second row either.
    """
    euler = ddim(t, alpha_bar)
    ab, ab_next = (each[:-1] for each in _levels(t, alpha_bar))
    gain = ab_next.sqrt() * (((1 - ab) / ab * ab_next / (1 - ab_next)).sqrt() - 1) / 2
    ones, zeros = torch.ones_like(gain), torch.zeros_like(gain)

    def both(steps: Tensor, corrections: Tensor) -> Tensor:
        rows = torch.cat([torch.stack([steps[:-1], corrections], 1).flatten(), steps[-1:]])
        return rows if len(rows) == calls else torch.cat([rows[:-2], rows[-1:]])

    a, b, c = both(euler.a, ones), both(euler.b, gain), both(euler.c, -gain)
    return Table(both(t, t[1:]), a, b, c, both(euler.s, zeros))


def _levels(t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha_bar at each step and after it; after the last it is 1, the clean picture. (S,) -> (S,), (S,)"""
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
    # a step is a call of the network everywhere, in limits and in progress, so Heun's method has half as many timesteps
    "heun": lambda _, ab, options: heun(
        timesteps(options.spacing, options.steps // 2 + 1, ab), ab, calls=options.steps
    ),
}


def timesteps(spacing: SpacingName, steps: int, alpha_bar: Tensor) -> Tensor:
    """Return distinct descending timesteps that start at T - 1: (steps,) int64. ValueError for more steps than T."""
    return _distinct(SPACINGS[spacing](steps, alpha_bar), len(alpha_bar))


def make_table(options: SamplingOptions, alpha_bar: Tensor, t: Tensor | None = None) -> Table:
    """Return the table of these options on a schedule, alpha_bar (T,) float64. ValueError for more steps than T.

    `t`: other timesteps than those of the options' spacing, descending.
    """
    if t is None:
        t = timesteps(options.spacing, options.steps, alpha_bar)
    return SAMPLERS[options.sampler](t, alpha_bar, options)
