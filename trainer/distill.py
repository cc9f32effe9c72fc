"""Distils a denoiser into one that takes fewer network rows a picture: an adapter on the teacher's weights.

`GuidedTarget` puts guidance into the network, one row a step instead of two (Meng et al. 2023, stage one).
`Trajectories` then puts several steps of the teacher's solver into one (progressive distillation, Salimans & Ho 2022,
at once for all stages and on the teacher's own path rather than on noised pictures). Sees no evaluator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from shared.checkpoint import CheckpointInfo, publish
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import Denoiser, adapt
from shared.diffusion.unet import UNet
from shared.options import SamplingOptions, picture_seed
from shared.storage import Location
from trainer.commands.train import changed
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.loss import Denoising, DenoisingLoss, finite

OPTIMIZER: Final[dict[str, Any]] = {
    "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 100, "cooldown": 0.5, "batch": 64,
    "label_dropout": 0.0, "publish": "long",
}  # fmt: skip
POOL_CHUNK = 256  # trajectories in a file of the pool


def make_config(teacher: CheckpointInfo, changes: list[str]) -> TrainConfig:
    """The teacher's own training, with an optimizer for small changes, and `field=value` changes."""
    return changed(TrainConfig.model_validate({**teacher.training.get("config", {}), **OPTIMIZER}), changes)


class AdaptedNetwork(nn.Module):
    """A frozen network and trained changes to it: of rank `rank` for matrices, whole for vectors.

    Starts as the network is, or from the changes of an adapter checkpoint of the same rank.
    """

    def __init__(self, network: UNet, rank: int, start: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.image_shape, self.num_labels = network.image_shape, network.num_labels
        self.frozen = (network,)  # in a tuple: no part of this module's parameters or state
        self.changes = nn.ParameterDict()
        for name, weight in network.state_dict().items():
            key = name.replace(".", "/")  # a parameter's own name has no dots
            if weight.ndim == 2 and rank * sum(weight.shape) < weight.numel():
                rows, columns = weight.shape
                self.changes[f"{key}/down"] = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
                self.changes[f"{key}/up"] = nn.Parameter(torch.zeros(rows, rank))
            else:
                self.changes[key] = nn.Parameter(torch.zeros_like(weight))
        if start:
            self.changes.load_state_dict({key.replace(".", "/"): value for key, value in start.items()})

    def tensors(self) -> dict[str, Tensor]:
        return {key.replace("/", "."): value for key, value in self.changes.items()}

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        network = self.frozen[0]
        out: Tensor = functional_call(network, adapt(network.state_dict(), self.tensors()), (x, t, labels, keep))
        return out


class GuidedTarget(DenoisingLoss):
    """The denoising loss with the teacher's guided prediction in place of the truth: null + w (cond - null)."""

    def __init__(self, config: TrainConfig, teacher: Denoiser, guidance: float, device: torch.device) -> None:
        super().__init__(config, teacher.alpha_bar, device)
        self.teacher, self.guidance = teacher.network, guidance

    @torch.no_grad()
    def target(self, x_t: Tensor, truth: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        B = len(x_t)
        keep = torch.arange(2 * B, device=x_t.device) < B
        both = (torch.cat([v, v]) for v in (x_t, t, labels))
        cond, null = self.teacher(*both, keep).float().chunk(2)
        guided: Tensor = null + self.guidance * (cond - null)
        return guided


def guided(
    dataset: Dataset, config: TrainConfig, teacher: Denoiser, guidance: float, device: torch.device
) -> Denoising:
    return Denoising(dataset, GuidedTarget(config, teacher, guidance, device), config)


class Trajectories:
    """The objective of few steps: from x_t at each of the student's steps to where the teacher's path goes from there.

    The target is the x0_hat with which one DDIM step, a x + b x0_hat, ends where the teacher's solver ended. Steps are
    weighed by one over the error that the teacher's own first x0_hat makes there, so that none drowns another.
    """

    def __init__(self, pool: dict[str, Tensor], teacher: Denoiser, device: torch.device) -> None:
        self.pool, self.prediction = pool, teacher.prediction
        alpha_bar = teacher.alpha_bar.to(device)
        self.signal, self.noise = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        self.weights = torch.zeros(len(alpha_bar), device=device)
        for t in torch.unique(pool["t"]):
            self.weights[t] = 1 / pool["error"][pool["t"] == t].mean().clamp(min=1e-6)
        self.weights /= self.weights[self.weights > 0].mean()

    def __len__(self) -> int:
        return len(self.pool["t"])

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        mine = index[share]
        return [self.pool[key][mine] for key in ("x", "t", "labels", "x0")]

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        x, t, labels, x0 = inputs
        x = x.float().contiguous(memory_format=torch.channels_last)
        prediction = network(x, t, labels, torch.ones_like(t, dtype=torch.bool)).float()
        a, s = self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]
        x0_hat = a * x - s * prediction if self.prediction == "v" else (x - s * prediction) / a
        return finite(((x0_hat - x0.float()).square().mean((1, 2, 3)) * self.weights[t]).mean())


@torch.inference_mode()
def trajectories(
    stepper: Stepper, alpha_bar: Tensor, labels: Tensor, seeds: list[int], steps: int, options: SamplingOptions
) -> dict[str, Tensor]:
    """The teacher's paths for labels (N, K), cut at the student's `steps`, as examples of `Trajectories`.

    x (N * steps, C, H, W) float16 and its t, labels and x0, the target; error is the squared error of the teacher's
    first x0_hat against x0. `options.steps` must be a multiple of `steps`, and the sampler deterministic.
    """
    rows = [stepper.new_row(one, options, seed) for one, seed in zip(labels, seeds, strict=True)]
    conditions, each = torch.stack([row.labels for row in rows]), options.steps // steps
    levels = [alpha_bar[t] for t in rows[0].table.t[::each]] + [torch.ones((), dtype=torch.float64)]
    parts: list[dict[str, Tensor]] = []
    for k in range(steps):
        t, start = rows[0].table.t[rows[0].step], torch.stack([row.x for row in rows])
        stepper.step(rows)
        first = torch.stack([row.x0_hat for row in rows if row.x0_hat is not None])
        for _ in range(each - 1):
            stepper.step(rows)
        end = torch.stack([row.x for row in rows])
        a = ((1 - levels[k + 1]) / (1 - levels[k])).sqrt()
        b = levels[k + 1].sqrt() - a * levels[k].sqrt()
        x0 = (end - float(a) * start) / float(b)
        error = (first - x0).square().mean((1, 2, 3))
        parts.append(
            {"x": start.half(), "t": t.expand(len(rows)), "labels": conditions, "x0": x0.half(), "error": error}
        )
    return {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}


def make_pool(
    folder: Path, teacher: Denoiser, lists: Tensor, count: int, steps: int, options: SamplingOptions,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:  # fmt: skip
    """`count` trajectories for label sets drawn from `lists` (M, K), in files of `folder`; goes on where it stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    stepper, chunks = teacher.stepper(), []
    for number in range(-(-count // POOL_CHUNK)):
        path = folder / f"{number:05d}.safetensors"
        if not path.exists():
            chosen = torch.randint(len(lists), (POOL_CHUNK,), generator=torch.Generator().manual_seed(number))
            seeds = [picture_seed(number, i) for i in range(POOL_CHUNK)]
            temporary = path.with_suffix(".tmp")
            save_file(trajectories(stepper, teacher.alpha_bar, lists[chosen], seeds, steps, options), temporary)
            temporary.replace(path)
        chunks.append(load_file(path))
        advance(POOL_CHUNK)
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


def publish_adapter(
    network: AdaptedNetwork, base: CheckpointInfo, storage: Location, name: str,
    options: SamplingOptions, training: dict[str, Any],
) -> Location:  # fmt: skip
    """Writes the changes in bf16, with the name and digest of what they change and how the result is to be sampled."""
    tensors = {key: value.detach().to("cpu", torch.bfloat16) for key, value in network.tensors().items()}
    config = {**base.config, "base": {"name": base.name, "digest": base.digest}}
    config |= {"sampling": options.model_dump(mode="json")}
    return publish(
        storage, name, tensors, kind="denoiser", vocabulary=base.vocabulary, config=config, training=training
    )
