"""Other samplers on the same weights: the course report's loop as its author wrote it, and diffusers' pipelines."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from shared.diffusion.model import Denoiser

Network = Callable[..., Tensor]


class LabelUNet(ModelMixin, ConfigMixin):
    """The shipped network as a diffusers model: (sample, timestep, labels, keep) -> its prediction."""

    @register_to_config
    def __init__(self, prediction: str = "v") -> None:
        super().__init__()
        self.network: nn.Module

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        t = timestep.expand(len(sample)).to(sample.device)
        return self.network(sample, t, labels.to(sample.dtype), keep)


def label_unet(denoiser: Denoiser, dtype: torch.dtype) -> LabelUNet:
    """Return a copy of the network in `dtype`, as diffusers' `from_pretrained(..., torch_dtype=dtype)` would."""
    from copy import deepcopy

    model = LabelUNet(denoiser.prediction)
    model.network = InDtype(deepcopy(denoiser.network), dtype)
    return model.eval()


class InDtype(nn.Module):
    """A network whose weights and inputs all have one dtype. Its time features, computed inside, are cast too."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype
        first = next(module for module in self.network.time.modules() if isinstance(module, nn.Linear))
        first.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        out: Tensor = self.network(x.to(self.dtype), t, labels.to(self.dtype), keep)
        return out


class LabelPipeline(DiffusionPipeline):
    """diffusers' loop, as in its conditional pipelines: a call, on the doubled batch if guided, and scheduler.step."""

    def __init__(self, unet: LabelUNet, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        only: int | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Sample (N, K) -> (N, 3, H, W). `only` stops after that many steps. `interval`: where in T guidance is on."""
        dtype = self.unet.network.dtype
        x = torch.randn(len(labels), *self.unet.network.network.image_shape, generator=generator, dtype=dtype)
        x = x * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(steps)
        for t in self.progress_bar(self.scheduler.timesteps[:only]):
            guided = guidance != 1.0 and interval[0] <= t / self.scheduler.config.num_train_timesteps <= interval[1]
            rows = torch.cat([labels, labels]) if guided else labels
            keep = torch.arange(len(rows)) >= len(rows) - len(labels)
            inputs = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            out = self.unet(inputs, t, rows, keep)
            if guided:
                null, conditional = out.chunk(2)
                out = null + guidance * (conditional - null)
            x = self.scheduler.step(out, t, x, **self._extra(generator)).prev_sample
        return x.float()

    def _extra(self, generator: torch.Generator) -> dict[str, Any]:
        return {"generator": generator}


def betas_of(alpha_bar: Tensor) -> list[float]:
    """Return the betas from which diffusers builds the same schedule: alpha_bar (T,) float64 -> T numbers."""
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return (1 - alpha_bar / before).tolist()


def pipeline(denoiser: Denoiser, solver: str, dtype: torch.dtype, unet: LabelUNet | None = None) -> LabelPipeline:
    """Return diffusers' pipeline for DDPM, DDIM or DPM-Solver++ on the denoiser's schedule."""
    kind = {"eps": "epsilon", "v": "v_prediction"}[denoiser.prediction]
    common = {"trained_betas": betas_of(denoiser.alpha_bar), "prediction_type": kind}
    schedulers: dict[str, Callable[[], Any]] = {
        "DDPM": lambda: DDPMScheduler(**common, clip_sample=False),
        "DDIM": lambda: DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True),
        "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++"),
    }
    return LabelPipeline(unet or label_unet(denoiser, dtype), schedulers[solver]())


class ReportSampler:
    """The course report's sampler as written: t = T - 1 ... 1, two network calls per step, fp32, sigma^2 = beta.

    x = (x - beta / sqrt(1 - alpha_bar) eps) / sqrt(alpha) + sqrt(beta) z, with eps = (1 + w) eps_labels - w eps_null.
    The report's w + 1 is this project's w.
    """

    def __init__(self, network: Network, alpha_bar: Tensor, prediction: str, shape: tuple[int, ...]) -> None:
        self.network, self.prediction, self.shape = network, prediction, shape
        self.alpha_bar = alpha_bar.float()
        self.beta = torch.tensor(betas_of(alpha_bar))
        self.alpha = 1 - self.beta

    def _eps(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        out = self.network(x, t, labels, keep)
        if self.prediction == "eps":
            return out
        ab = self.alpha_bar[t][:, None, None, None]
        return ab.sqrt() * out + (1 - ab).sqrt() * x

    @torch.no_grad()
    def __call__(self, labels: Tensor, w: float, generator: torch.Generator, only: int | None = None) -> Tensor:
        """Sample (N, K) -> (N, C, H, W). `only` stops after that many steps."""
        n, T = len(labels), len(self.alpha_bar)
        with_labels, without = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        x = torch.randn(n, *self.shape, generator=generator)
        for i in list(reversed(range(1, T)))[:only]:
            t = torch.full((n,), i)
            conditional = self._eps(x, t, labels, with_labels)
            null = self._eps(x, t, labels, without)
            eps = w * conditional + (1 - w) * null
            alpha, ab, beta = (v[t][:, None, None, None] for v in (self.alpha, self.alpha_bar, self.beta))
            z = torch.randn(x.shape, generator=generator) if i > 1 else torch.zeros_like(x)
            x = 1 / alpha.sqrt() * (x - (1 - alpha) / (1 - ab).sqrt() * eps) + beta.sqrt() * z
        return x
