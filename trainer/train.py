"""Trains the denoiser. Read `train` from top to bottom; to resume, run the same command again.

Under torchrun every rank takes its share of the same global batch, so N processes give what one gives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.checkpoint import publish
from shared.device import autocast_dtype, kept_memory
from shared.diffusion.layouts import Layouts
from shared.diffusion.schedules import alpha_bar as make_alpha_bar
from shared.diffusion.unet import NetworkConfig, UNet
from shared.storage import Location
from shared.vocabulary import Vocabulary
from trainer.averages import Averages
from trainer.config import TrainConfig
from trainer.data import Dataset, positions_told
from trainer.errors import TrainerError
from trainer.loss import Denoising, DenoisingLoss, Objective
from trainer.muon import Muon
from trainer.run_log import RunLog

SAVE_EVERY_S = 300.0
LOG_EVERY = 50  # steps


@dataclass
class Budget:
    """How long a run lasts: minutes of training time, steps, or whichever ends first. At least one is set."""

    minutes: float | None = None
    steps: int | None = None

    def progress(self, elapsed_s: float, step: int) -> float:
        """Share of the run that is over, 0 to 1 and beyond."""
        by_time = elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        return max(by_time, step / self.steps if self.steps else 0.0)


@dataclass
class Run:
    """What a run is doing now, for whoever watches it: the progress bar, the sampler of grids, the tests."""

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = 0.0
    progress: float = 0.0
    resumed_at: int = 0  # the step at which this process went on; where it is `step`, nothing was left to do
    history: list[dict[str, float]] = field(default_factory=list)


def make_network(config: TrainConfig, dataset: Dataset) -> UNet:
    network = NetworkConfig(
        num_labels=len(dataset.vocabulary), image_size=config.image_size,
        positions=positions_told(config, dataset) is not None, **config.network,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    unet = UNet(network)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return unet


def make_optimizers(network: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside and AdamW for the first and last layer, embeddings and vectors."""
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(network.parameters(), config.lr, config.betas, weight_decay=config.weight_decay)]
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = parameter.ndim == 2 and not name.startswith(("stem", "head", "conditioning", "time"))
        (matrices if inside else others).append(parameter)
    # Muon's update has AdamW's size: one learning rate serves both
    return [
        Muon(matrices, config.lr, config.weight_decay),
        torch.optim.AdamW(others, config.lr, config.betas, weight_decay=0.0),
    ]


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up, constant, then linear to zero over the last `cooldown` of the run."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    down = min(1.0, max(0.0, 1 - progress) / config.cooldown) if config.cooldown else 1.0
    return config.lr * warm * down


def step_seed(seed: int, step: int) -> int:
    """All of a step's randomness follows from (seed, step): resuming needs no random state."""
    return seed * 1_000_003 + step


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step_seed(seed, step))


def batch_indices(n: int, batch: int, seed: int, step: int) -> Tensor:
    """The pictures of a step: epoch after epoch, each in an order of its own."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // n
    orders = {e: torch.randperm(n, generator=torch.Generator().manual_seed(seed + e)) for e in set(epochs.tolist())}
    return torch.stack([orders[int(e)][int(p) % n] for e, p in zip(epochs, positions, strict=True)])


def _join(device: torch.device) -> tuple[int, int]:
    """This process's rank and their number, having joined the others where torchrun started several."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        # long: the others wait while rank 0 takes a grid and a score
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return dist.get_rank(), dist.get_world_size()


def checkpoint_config(config: TrainConfig, network: UNet, aspect: float) -> dict[str, Any]:
    """What rebuilds the denoiser: `shared.diffusion.model.load_denoiser` reads these five. `aspect`: `Dataset.aspect`."""
    shape = network.config.model_dump(mode="json")
    return {
        "network": shape,
        "schedule": config.schedule,
        "timesteps": config.timesteps,
        "prediction": config.prediction,
        "aspect": aspect,
    }


def publish_network(
    network: nn.Module, config: TrainConfig, dataset: Dataset, storage: Location, name: str, training: dict[str, Any]
) -> Location:
    """Writes bf16 weights with the whole configuration into storage, atomically."""
    unet = network.module if isinstance(network, DistributedDataParallel) else network
    assert isinstance(unet, UNet)
    tensors = {key: value.detach().to("cpu", torch.bfloat16) for key, value in unet.state_dict().items()}
    if (positions := positions_told(config, dataset)) is not None:
        tensors["layouts"] = Layouts.of(positions).points.to(torch.bfloat16)
    training = {**training, "config": config.model_dump(mode="json")}
    return publish(
        storage, name, tensors, kind="denoiser", vocabulary=dataset.vocabulary.names,
        config=checkpoint_config(config, unet, dataset.aspect), training=training,
    )  # fmt: skip


def save_state(path: Path, recipe: dict[str, Any], vocabulary: Vocabulary, run: Run, parts: dict[str, Any]) -> None:
    """Writes what a run goes on from, atomically; `parts` are the state dicts of whatever learns or averages."""
    temporary = path.with_suffix(".tmp")
    state = {"config": recipe, "vocabulary": list(vocabulary.names), "step": run.step, "elapsed_s": run.elapsed_s}
    try:
        torch.save({**state, **parts}, temporary)
    except RuntimeError as error:  # torch's word for a full disk
        temporary.unlink(missing_ok=True)
        raise TrainerError(f"{path} cannot be written; is the disk full? ({error})") from error
    os.replace(temporary, path)


def load_state(
    path: Path, recipe: dict[str, Any], vocabulary: Vocabulary, run: Run, device: torch.device
) -> dict[str, Any]:
    """The state in `path`; `run` stands where it stopped.

    A run resumes only with what it was started with: a silent change of the recipe would make its log a lie.
    Raises TrainerError for that, and for a file that is no state.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        before, names = state["config"], state.get("vocabulary", list(vocabulary.names))
        run.step, run.elapsed_s, run.resumed_at = state["step"], state["elapsed_s"], state["step"]
    except Exception as error:  # torch raises a dozen kinds for a broken file
        raise TrainerError(f"{path} is no state of a run; delete it to start anew ({type(error).__name__})") from error
    if names != list(vocabulary.names):
        raise TrainerError(f"{path} was started with another objects.json; choose another --run or delete it")
    if changed := [key for key in recipe if recipe[key] != before.get(key)]:
        raise TrainerError(f"{path} was started with another {', '.join(changed)}; choose another --run or delete it")
    return state


def train(
    dataset: Dataset,
    config: TrainConfig,
    folder: Path,
    budget: Budget,
    *,
    device: torch.device,
    start: dict[str, Tensor] | None = None,
    start_from: str | None = None,
    network: nn.Module | None = None,
    objective: Objective | None = None,
    on_step: Callable[[Run], None] = lambda _: None,
    evaluate: Callable[[nn.Module, Run], dict[str, float]] | None = None,
    evaluate_every_s: float = 600.0,
    evaluate_every_share: float = 1.0,
) -> tuple[Averages, Run]:
    """Trains until the budget is spent; state, log and TensorBoard events go to `folder`.

    `start`: a state dict to begin with instead of random weights; what it lacks begins as in a new network.
    `start_from`: what it is called. A run that is resumed goes on from its own state.
    `network` and `objective`: other ones than `config` and `dataset` describe, for distillation.

    `evaluate(averaged network, run)` is called by rank 0 at the end, every `evaluate_every_s` seconds and whenever
    another `evaluate_every_share` of the budget is spent; its figures are logged.
    Raises TrainerError where `folder` holds a run of another configuration, start or other data, FloatingPointError
    where the loss diverges.
    """
    rank, world = _join(device)
    if config.batch % world:
        raise TrainerError(f"batch {config.batch} must be a multiple of the {world} processes")
    share = slice(rank * config.batch // world, (rank + 1) * config.batch // world)
    folder.mkdir(parents=True, exist_ok=True)
    network = (network or make_network(config, dataset)).to(device)
    if start is not None:
        network.load_state_dict({**network.state_dict(), **start})
    model = DistributedDataParallel(network) if world > 1 else network
    optimizers, averages, run = make_optimizers(network, config), Averages(network, config), Run()
    if objective is None:
        noised = DenoisingLoss(config, make_alpha_bar(config.schedule, config.timesteps), device)
        objective = Denoising(dataset, noised, config)
    dtype, state_path = autocast_dtype(device), folder / "state.pt"
    recipe = {**config.model_dump(mode="json"), "data": dataset.digest, "start_from": start_from}

    if state_path.exists():
        state = load_state(state_path, recipe, dataset.vocabulary, run, device)
        network.load_state_dict(state["network"])
        averages.load_state_dict(state["averages"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    with kept_memory(), RunLog(folder if rank == 0 else None) as log:

        def save() -> None:
            if rank == 0:
                parts: dict[str, Any] = {"network": network.state_dict(), "averages": averages.state_dict()}
                parts["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
                save_state(state_path, recipe, dataset.vocabulary, run, parts)

        def measure() -> None:
            if rank == 0 and evaluate:
                run.history.append(figures := evaluate(averages.network(config.publish), run))
                log.record(run.step, run.elapsed_s, figures)

        last = saved_at = measured_at = time.monotonic()
        sums = torch.zeros(3)  # of loss, gradient's norm and steps since the last line of the log
        while (progress := _agreed(budget.progress(run.elapsed_s, run.step), world, device)) < 1:
            generator = step_generator(config.seed, run.step)
            index = batch_indices(len(objective), config.batch, config.seed, run.step)
            inputs = [value.to(device, non_blocking=True) for value in objective.draw(index, share, generator)]

            rate = learning_rate(config, run.step, progress)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = objective(model, *inputs)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm or torch.inf)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            averages.update(run.step)

            now = time.monotonic()
            run.step, run.elapsed_s, run.progress, last = run.step + 1, run.elapsed_s + now - last, progress, now
            sums += torch.tensor([loss.item(), norm.item(), 1.0])
            if run.step % LOG_EVERY == 0:
                run.loss, grad_norm = (sums[:2] / sums[2]).tolist()
                sums.zero_()
                figures = {"loss": run.loss, "grad_norm": grad_norm, "lr": rate, "pictures": run.step * config.batch}
                log.record(run.step, run.elapsed_s, figures)
            on_step(run)
            if now - saved_at > SAVE_EVERY_S:
                save()
                saved_at = time.monotonic()
            spent = budget.progress(run.elapsed_s, run.step)
            another_share = spent < 1 and spent // evaluate_every_share > progress // evaluate_every_share
            if another_share or now - measured_at > evaluate_every_s:
                measure()
                measured_at = last = time.monotonic()  # measuring is not training time
        save()
        measure()
    if world > 1:
        dist.barrier()  # nobody leaves while rank 0 still measures
        # The wrapper goes before the process group: going after it, it would end that under Python's lock, for which
        # gloo's own threads may wait, and hang.
        del model
        dist.destroy_process_group()
    return averages, run


def _agreed(progress: float, world: int, device: torch.device) -> float:
    """Rank 0's progress, so that all processes stop at the same step."""
    if world == 1:
        return progress
    value = torch.tensor([progress], dtype=torch.float64, device=device)
    dist.broadcast(value, 0)
    return float(value)
