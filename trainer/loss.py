"""The denoising loss: the distribution of noise levels and the weight of each level. Knows no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.diffusion.predictions import to_x0
from trainer.config import TrainConfig

# Of an error of the prediction, in x_0. An eps network errs by some 0.2 (root mean square) wherever there is noise: 20
# times that is twice the range of a picture, so what x0_hat says beyond is noise, however much it weighs. Without a
# limit eps with EDM's weight learns the last timestep alone. For v, whose errors never grow, it changes nothing.
MOST_AMPLIFIED = 20.0


def noise_level_weights(config: TrainConfig, alpha_bar: Tensor) -> Tensor:
    """Return the probability of drawing each timestep, (T,) float64: uniform, or log-SNR normally distributed.

    The mass of a timestep is the density at its log-SNR times the width of its step in log-SNR.
    """
    if config.noise_levels == "uniform":
        return torch.full_like(alpha_bar, 1 / len(alpha_bar))
    log_snr = torch.log(alpha_bar / (1 - alpha_bar))
    width = torch.gradient(log_snr)[0].abs()
    density = torch.exp(-0.5 * ((log_snr - config.log_snr_mean) / config.log_snr_std) ** 2)
    mass = density * width
    # One draw in a hundred is uniform, so that training covers every level that a sampler visits.
    return 0.99 * mass / mass.sum() + 0.01 / len(alpha_bar)


def draw_timesteps(config: TrainConfig, levels: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps (batch,) from the distribution `levels` (T,): one from each of equal shares, or independently."""
    if config.stratified:
        u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    else:
        u = torch.rand(batch, generator=generator)
    return torch.searchsorted(levels.cumsum(0), u.double()).clamp(max=len(levels) - 1)


def loss_weights(config: TrainConfig, alpha_bar: Tensor) -> Tensor:
    """Return the weight of the prediction's squared error at each timestep, (T,) float64.

    An error e of x0_hat is e / |q| in the prediction (`to_x0`): with SNR = alpha_bar / (1 - alpha_bar), sqrt(SNR) e in
    eps and sqrt(SNR + 1) e in v. Beside weights that do not fall with the SNR, |q| counts as MOST_AMPLIFIED at most.
    min_snr: min(SNR, gamma) on x_0 (Hang et al. 2023, eq. 8). edm: SNR + 1 / sigma_data^2 on x_0, which is EDM's
    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 at sigma^2 = 1 / SNR (Karras et al. 2022, table 1), with mean 1.
    sqrt_snr: sqrt(SNR) on x_0, with mean 1. It is about the inverse of the error that remains at each level on the
    rendered pictures, so no level dominates (EDM2 learns such a weight: Karras et al. 2024, eq. 21).
    """
    snr = alpha_bar / (1 - alpha_bar)
    amplified = to_x0(alpha_bar, config.prediction).q.abs()
    if config.loss_weight == "min_snr":
        return snr.clamp(max=config.min_snr_gamma) * amplified.square()
    if config.loss_weight in ("edm", "sqrt_snr"):
        on_x0 = snr + config.sigma_data**-2 if config.loss_weight == "edm" else snr.sqrt()
        weights = on_x0 * amplified.clamp(max=MOST_AMPLIFIED).square()
        return weights / (weights * noise_level_weights(config, alpha_bar)).sum()
    return torch.ones_like(snr)


def draw_noise(seeds: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw normal noise (B, *shape) on the device, each example's from its own seed: seeds (B,) int64 on the CPU.

    So a process draws its own share of a batch alone, and nothing has to be copied to a GPU or waited for. Another kind
    of device draws other noise from the same seeds.
    """
    generator = torch.Generator(device)
    noise = torch.empty(len(seeds), *shape, device=device)
    for one, seed in zip(noise, seeds.tolist(), strict=True):
        one.normal_(generator=generator.manual_seed(seed))
    return noise
