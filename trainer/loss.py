"""The denoising loss: the distribution of noise levels, what the network predicts, and the weight of each level."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from shared.device import autocast_dtype
from shared.diffusion.layouts import OUTSIDE, with_positions
from shared.diffusion.schedules import alpha_bar as make_alpha_bar
from trainer.config import TrainConfig
from trainer.data import Dataset, positions_of, rotations_of, to_float


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


def loss_weights(config: TrainConfig, alpha_bar: Tensor) -> Tensor:
    """Return the weight of the squared error of eps or v at each timestep, (T,) float64.

    With SNR = alpha_bar / (1 - alpha_bar), an error e of x0_hat is sqrt(SNR) e in eps and sqrt(SNR + 1) e in v.
    min_snr: min(SNR, gamma) on x_0 (Hang et al. 2023, eq. 8). edm: SNR + 1 / sigma_data^2 on x_0, which is EDM's
    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 at sigma^2 = 1 / SNR (Karras et al. 2022, table 1), with mean 1.
    sqrt_snr: sqrt(SNR) on x_0, with mean 1. It is about the inverse of the error that remains at each level on the
    rendered pictures, so no level dominates (EDM2 learns such a weight: Karras et al. 2024, eq. 21).
    """
    snr = alpha_bar / (1 - alpha_bar)
    per_prediction = snr if config.prediction == "eps" else snr + 1
    if config.loss_weight == "min_snr":
        return snr.clamp(max=config.min_snr_gamma) / per_prediction
    if config.loss_weight in ("edm", "sqrt_snr"):
        on_x0 = snr + config.sigma_data**-2 if config.loss_weight == "edm" else snr.sqrt()
        weights = on_x0 / per_prediction
        return weights / (weights * noise_level_weights(config, alpha_bar)).sum()
    return torch.ones_like(snr)


def finite(loss: Tensor) -> Tensor:
    if not math.isfinite(value := float(loss.detach())):
        raise FloatingPointError(f"the loss is {value}; lower lr or raise warmup_steps (--set lr=...)")
    return loss


class Objective(Protocol):
    """What `train` minimises: examples by index, and their loss. The first dimension of their tensors is the batch."""

    def __len__(self) -> int: ...

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Return the `share` of the examples `index`, on the CPU. `generator` advances as for all of them."""

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the loss of drawn examples, on the device. Raises FloatingPointError where it is not finite."""


class Denoising:
    """The training objective: denoise pictures of a data set."""

    def __init__(self, dataset: Dataset, config: TrainConfig, device: torch.device) -> None:
        self.dataset, self.config = dataset, config
        self.positions, self.rotations = positions_of(config, dataset), rotations_of(config, dataset)
        schedule = make_alpha_bar(config.schedule, config.timesteps)
        self.levels = noise_level_weights(config, schedule).cumsum(0)  # stays on the CPU, where t is drawn
        self.weights = loss_weights(config, schedule).float().to(device)
        self.signal, self.noise = schedule.sqrt().float().to(device), (1 - schedule).sqrt().float().to(device)

    def __len__(self) -> int:
        return len(self.dataset)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw x_0, labels, t, eps, and whether labels are kept. t is stratified: one in each of B equal shares."""
        B, images = len(index), self.dataset.images[index[share]]
        u = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
        t = torch.searchsorted(self.levels, u.double()).clamp(max=len(self.levels) - 1)
        eps = torch.randn(B, *images.shape[1:], generator=generator)
        drawn = torch.rand(B if self.config.label_dropout_by == "picture" else 1, generator=generator)
        labels = self.dataset.labels[index[share]]
        keep = (drawn >= self.config.label_dropout).expand(B)[share] & labels.any(1)  # not those of unknown labels
        if self.positions is not None:
            known = torch.rand(B, 1, 1, generator=generator)[share] >= self.config.position_dropout
            rotations = None if self.rotations is None else self.rotations[index[share]] * known
            positions = self.positions[index[share]].where(known, torch.tensor(OUTSIDE))
            labels = with_positions(labels, positions, rotations)
        return [to_float(images), labels, t[share], eps[share], keep]

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the mean weighted squared error."""
        x_0, labels, t, eps, keep = inputs
        a, s = self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]
        target = a * eps - s * x_0 if self.config.prediction == "v" else eps
        error = (network(a * x_0 + s * eps, t, labels, keep).float() - target).square().mean((1, 2, 3))
        return finite((error * self.weights[t]).mean())


@torch.inference_mode()
def fixed_loss(network: nn.Module, objective: Objective, *, batch: int, most: int = 1024) -> float:
    """Return the mean loss of up to `most` evenly spaced examples, with the same noise and timesteps in every call.

    `network` is in evaluation mode.
    """
    count, generator = min(len(objective), most), torch.Generator().manual_seed(0)
    device, total = next(network.parameters()).device, 0.0
    dtype = autocast_dtype(device)
    for index in torch.split(torch.linspace(0, len(objective) - 1, count).long(), batch):
        inputs = [value.to(device) for value in objective.draw(index, slice(0, len(index)), generator)]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            total += len(index) * float(objective(network, *inputs))
    return total / count
