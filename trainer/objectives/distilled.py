"""Distils a denoiser into one of the same shape that needs fewer network rows a picture.

Several steps of the teacher's solver, with its guidance, become one step of one row. It is progressive distillation
(Salimans & Ho 2022), with all stages at once, and along the teacher's own paths instead of noised pictures. Knows no
evaluator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from shared import storage as files
from shared.checkpoint import publish
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import Denoiser, load_denoiser
from shared.diffusion.samplers import make_table, timesteps
from shared.diffusion.unet import UNet
from shared.options import SamplingOptions, picture_seed
from shared.registry import resolve
from shared.storage import Location
from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.objectives.whole import config_of, weights_of
from trainer.runs import Run

POOL_CHUNK = 256  # trajectories in a file of the pool
RUN: Final = RunConfig(lr=5e-4, weight_decay=0.0, warmup_steps=100, cooldown=0.5)  # small changes to a trained network


def make_samplings(
    teacher: Denoiser, steps: int, teacher_steps: int, guidance: float
) -> tuple[SamplingOptions, SamplingOptions]:
    """Return how the student is sampled, in `steps`, and how the teacher's trajectories are, in `teacher_steps`.

    TrainerError if the teacher has fewer timesteps than steps, or if one step of the student is not a whole number of
    the teacher's.
    """
    if teacher_steps % steps:
        raise TrainerError(f"--teacher-steps {teacher_steps} must be a multiple of --sampling-steps {steps}")
    path = SamplingOptions(sampler="dpmpp_2m", steps=teacher_steps, guidance=guidance)
    if teacher_steps > (most := len(teacher.alpha_bar)):
        raise TrainerError(f"--teacher-steps {teacher_steps}: {teacher.info.name} has {most} timesteps")
    return SamplingOptions(sampler="ddim", steps=steps, guidance=1.0), path


def make_student(teacher: Denoiser, storage: Location, start_from: str | None = None) -> UNet:
    """Return a network with the weights of the teacher, or of the checkpoint `start_from`.

    TrainerError if that is another network, or has another vocabulary.
    """
    start = load_denoiser(resolve(storage, start_from, "denoiser")) if start_from else teacher
    if start.network.config != teacher.network.config or start.vocabulary != teacher.vocabulary:
        raise TrainerError(f"{start.info.name} is another network than {teacher.info.name}; start from one like it")
    network = UNet(teacher.network.config)
    network.load_state_dict(start.network.state_dict())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class Distilling:
    """The objective: each step of the student ends where several of the teacher's end.

    The target is the x0_hat with which one DDIM step, a x + b x0_hat, ends where the teacher's solver ended. Target and
    x0_hat are clamped as the sampling loop clamps x0_hat. A step is weighted by the inverse of the error that the
    teacher's own first x0_hat makes there, so that no step dominates.

    `sampling`: how the student is sampled.
    """

    name = "distilled"

    def __init__(
        self, pool: dict[str, Tensor], teacher: Denoiser, sampling: SamplingOptions, device: torch.device,
        watch: Callable[[nn.Module, Run], dict[str, float]] | None = None,
    ) -> None:  # fmt: skip
        self.pool, self.teacher, self.sampling, self.watch = pool, teacher, sampling, watch
        self.source = {"teacher": teacher.info.digest}
        self.to_x0 = teacher.path.to_x0.to(device)
        weights = torch.zeros(len(teacher.alpha_bar))
        for t in torch.unique(pool["t"]):
            weights[t] = 1 / pool["error"][pool["t"] == t].mean().clamp(min=1e-6)
        self.weights = (weights / weights[weights > 0].mean()).to(device)

    def __len__(self) -> int:
        return len(self.pool["t"])

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        return [self.pool[key][index[share]] for key in ("x", "t", "labels", "x0")]

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        x, t, labels, x0 = inputs
        x = x.float().contiguous(memory_format=torch.channels_last)
        prediction = network(x, t, labels, torch.ones_like(t, dtype=torch.bool)).float()
        x0_hat = self.to_x0(x, prediction, t)
        loss: Tensor = ((x0_hat - x0.float()).square().mean((1, 2, 3)) * self.weights[t]).mean()
        return loss

    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        return self.watch(network, run) if self.watch else {}

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        """Write a checkpoint in bf16, with the teacher's layout network and the sampling options of the result."""
        weights = {**weights_of(self.teacher), **network.state_dict()}
        return publish(
            storage, name, {key: value.detach().to("cpu", torch.bfloat16) for key, value in weights.items()},
            kind="denoiser", vocabulary=self.teacher.info.vocabulary,
            config={**config_of(self.teacher), "sampling": self.sampling.model_dump(mode="json")}, training=training,
        )  # fmt: skip


@torch.inference_mode()
def trajectories(
    teacher: Denoiser, stepper: Stepper, labels: Tensor, seeds: list[int], steps: int, options: SamplingOptions
) -> dict[str, Tensor]:
    """Sample the teacher's paths for labels (N, K), and cut them at the student's `steps` into examples.

    Returns x (N * steps, C, H, W) in float16 with its t, labels and target x0; `error` is the squared error of the
    teacher's first x0_hat against x0. `options.steps` must be a multiple of `steps`, and the sampler deterministic.
    """
    alpha_bar, limits = teacher.alpha_bar, teacher.path.to_x0.limit
    rows = stepper.new_rows(labels, [options] * len(labels), seeds)
    conditions, each = torch.stack([row.labels for row in rows]), options.steps // steps
    # the teacher passes through the student's own timesteps: rounded to whole ones, its own may be one off
    through = rows[0].table.t.clone()
    through[::each] = timesteps(options.spacing, steps, alpha_bar)
    table = make_table(options, alpha_bar, through)
    for row in rows:
        row.table = table
    levels = [alpha_bar[t] for t in through[::each]] + [torch.ones((), dtype=torch.float64)]
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
        x0 = ((end - float(a) * start) / float(b)).clamp(-float(limits[t]), float(limits[t]))
        error = (first - x0).square().mean((1, 2, 3))
        parts.append(
            {"x": start.half(), "t": t.expand(len(rows)), "labels": conditions, "x0": x0.half(), "error": error}
        )
    return {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}


def make_pool(
    folder: Path, teacher: Denoiser, lists: Tensor, count: int, steps: int, options: SamplingOptions,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:  # fmt: skip
    """Sample `count` trajectories for label sets drawn from `lists` (M, K) into files of `folder`; resumes by file."""
    chunks, stepper = [], None
    for number in range(-(-count // POOL_CHUNK)):
        path = folder / f"{number:05d}.safetensors"
        try:
            chunks.append(load_file(path))
        except (FileNotFoundError, SafetensorError):  # not sampled yet, or damaged
            chosen = torch.randint(len(lists), (POOL_CHUNK,), generator=torch.Generator().manual_seed(number))
            seeds = [picture_seed(number, i) for i in range(POOL_CHUNK)]
            stepper = stepper or teacher.stepper()
            examples = trajectories(teacher, stepper, lists[chosen], seeds, steps, options)
            files.write(path, save(examples))
            chunks.append(load_file(path))
        advance(POOL_CHUNK)
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
