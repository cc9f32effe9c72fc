"""Trains the denoiser. Read `train` from top to bottom; to resume, run the same command again.

Under torchrun each process takes its share of the same global batch, so the result does not depend on their number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.checkpoint import load, publish
from shared.device import autocast_dtype, kept_memory
from shared.diffusion.layouts import LAYOUTS, LayoutNetwork
from shared.diffusion.unet import NetworkConfig, UNet
from shared.options import WITH_POSITIONS
from shared.registry import resolve
from shared.storage import Location
from trainer.averages import Averages
from trainer.config import TrainConfig
from trainer.data import Dataset, check_labelled, positions_of, rotations_of, support_of
from trainer.errors import TrainerError
from trainer.loss import Denoising, Objective
from trainer.runs import LOG_EVERY, SAVE_EVERY_S, Budget, Run, load_state, rate_share, run_log, save_state, step_seed


def make_network(config: TrainConfig, dataset: Dataset) -> UNet:
    own: dict[str, Any] = {"spread": round(dataset.object_size / 2, 4)} if dataset.object_size else {}
    network = NetworkConfig(
        num_labels=len(dataset.vocabulary), image_size=config.image_size,
        positions=positions_of(config, dataset) is not None, rotations=rotations_of(config, dataset) is not None,
        **own, **config.network,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    unet = UNet(network)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return unet


def make_optimizers(network: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW for all parameters, or Muon for the inner matrices and AdamW for all else.

    All else is the first and last layer, embeddings and vectors. `match_rms_adamw` gives Muon's update the size of
    AdamW's (Liu et al. 2025, sec. 2.2), so both share one learning rate.
    """
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(network.parameters(), config.lr, config.betas, weight_decay=config.weight_decay)]
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = parameter.ndim == 2 and not name.startswith(("stem", "head", "conditioning", "time"))
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, config.lr, config.betas, weight_decay=0.0),
    ]


def batch_indices(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Return the indices of a step's pictures. Each epoch shows all `n` pictures once, in its own order."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // n
    orders = {e: torch.randperm(n, generator=torch.Generator().manual_seed(seed + e)) for e in set(epochs.tolist())}
    return torch.stack([orders[int(e)][int(p) % n] for e, p in zip(epochs, positions, strict=True)])


def _join(device: torch.device) -> tuple[int, int]:
    """Join the other processes where torchrun started several; return this one's rank and their number."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        # a long timeout, since the others wait while rank 0 samples a grid and scores it
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return dist.get_rank(), dist.get_world_size()


def checkpoint_config(config: TrainConfig, network: UNet, aspect: float) -> dict[str, Any]:
    """Return the fields from which `shared.diffusion.model.load_denoiser` rebuilds the denoiser."""
    return {
        "network": network.config.model_dump(mode="json"),
        "schedule": config.schedule,
        "timesteps": config.timesteps,
        "prediction": config.prediction,
        "aspect": aspect,
    }


def publish_network(
    network: nn.Module, config: TrainConfig, dataset: Dataset, storage: Location, name: str, training: dict[str, Any],
    layouts: LayoutNetwork | None = None,
) -> Location:  # fmt: skip
    """Write bf16 weights and the whole configuration to storage, atomically. `layouts`: where it takes positions."""
    assert isinstance(network, UNet)
    state, described = dict(network.state_dict()), checkpoint_config(config, network, dataset.aspect)
    described["support"] = support_of(dataset, positions_of(config, dataset)).model_dump(mode="json")
    if layouts is not None:
        state |= {f"{LAYOUTS}{key}": value for key, value in layouts.state_dict().items()}
        described["layouts"] = layouts.config.model_dump(mode="json")
        described["sampling"] = WITH_POSITIONS.model_dump(mode="json")
    return publish(
        storage, name, {key: value.detach().to("cpu", torch.bfloat16) for key, value in state.items()},
        kind="denoiser", vocabulary=dataset.vocabulary.names, config=described,
        training={**training, "config": config.model_dump(mode="json")},
    )  # fmt: skip


def starting_weights(storage: Location, name: str, config: TrainConfig, dataset: Dataset) -> dict[str, Tensor]:
    """Return a published denoiser's weights, to start a run with `config` from them.

    The run's network may also take positions and rotations, and may have more blocks in each level. A new block starts
    as the identity (Chen et al. 2016, "Net2Net", sec. 2.3), since its last convolution is zero.
    """
    info, weights = load(resolve(storage, name, "denoiser"))
    if base := info.config.get("base"):
        raise TrainerError(f"{name} is an adapter; start from the checkpoint that it changes, {base['name']}")
    if info.vocabulary != dataset.vocabulary.names:
        raise TrainerError(f"{name} has another vocabulary than the data set; it cannot be started from")
    wanted = checkpoint_config(config, make_network(config, dataset), dataset.aspect)
    network = NetworkConfig.model_validate(info.config["network"])
    network = network.model_copy(update={key: True for key in ("positions", "rotations") if wanted["network"].get(key)})
    network = network.model_copy(update=_more_blocks(network, NetworkConfig.model_validate(wanted["network"])))
    found = {"aspect": dataset.aspect, **info.config, "network": network.model_dump(mode="json")}
    if different := [key for key in wanted if wanted[key] != found.get(key)]:
        raise TrainerError(f"{name} has another {', '.join(different)} than this run; it cannot be started from")
    return {key: value for key, value in weights.items() if not key.startswith("layouts")}  # the run has its own


def _more_blocks(found: NetworkConfig, wanted: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Return the numbers of blocks of `wanted` where none is smaller and the levels are as many."""
    numbers = {side: (getattr(found, side), getattr(wanted, side)) for side in ("encoder_blocks", "decoder_blocks")}
    return {
        side: new for side, (old, new) in numbers.items()
        if len(old) == len(new) and all(more >= blocks for blocks, more in zip(old, new, strict=True))
    }  # fmt: skip


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
    """Train until the budget is spent; state, log and TensorBoard events go to `folder`.

    `start`: a state dict to start from, and `start_from` its name; parameters that it lacks start at random. A resumed
    run continues from its own state instead. `network` and `objective`: those of a distillation.

    Rank 0 calls `evaluate(averaged network, run)` at the end, every `evaluate_every_s` seconds, and each time another
    `evaluate_every_share` of the budget is spent; the figures are logged.
    Raises TrainerError for pictures without labels and for another run's `folder`, FloatingPointError where the loss
    diverges.
    """
    if objective is None:
        check_labelled(dataset, "training pictures")
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
        objective = Denoising(dataset, config, device)
    dtype, state_path = autocast_dtype(device), folder / "state.pt"
    recipe = {**config.model_dump(mode="json"), "data": dataset.digest, "start_from": start_from}

    if state_path.exists():
        state = load_state(state_path, "denoiser", network, recipe, dataset.vocabulary, run)
        network.load_state_dict(state["network"])
        averages.load_state_dict(state["averages"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    if (first := _agreed(run.step, world, device)) != run.step:
        problem = f"is at step {run.step} here, and at step {first:.0f} for the first process"
        raise TrainerError(f"{folder}: {problem}; all processes must resume from the same folder")

    with kept_memory(), run_log(folder if rank == 0 else None) as record:

        def save() -> None:
            if rank == 0:
                parts: dict[str, Any] = {"network": network.state_dict(), "averages": averages.state_dict()}
                parts["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
                save_state(state_path, recipe, dataset.vocabulary, run, parts)

        def measure() -> None:
            if rank == 0 and evaluate:
                run.history.append(figures := evaluate(averages.network(config.publish), run))
                record(run, figures)

        last = saved_at = measured_at = time.monotonic()
        sums = torch.zeros(3)  # of the loss, the gradient's norm and the steps since the last line of the log
        while (progress := _agreed(budget.progress(run.elapsed_s, run.step), world, device)) < 1:
            generator = torch.Generator().manual_seed(step_seed(config.seed, run.step))
            index = batch_indices(len(objective), config.batch, config.seed, run.step)
            inputs = [value.to(device, non_blocking=True) for value in objective.draw(index, share, generator)]

            rate = config.lr * rate_share(run.step, progress, config.warmup_steps, config.cooldown)
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
                loss_sum, norm_sum, steps = _added(sums, world, device).tolist()
                run.loss, grad_norm = loss_sum / steps, norm_sum / steps
                sums.zero_()
                figures = {"loss": run.loss, "grad_norm": grad_norm, "lr": rate, "pictures": run.step * config.batch}
                record(run, figures)
            on_step(run)
            if now - saved_at > SAVE_EVERY_S:
                save()
                saved_at = time.monotonic()
            spent = budget.progress(run.elapsed_s, run.step)
            another_share = spent < 1 and spent // evaluate_every_share > progress // evaluate_every_share
            if another_share or now - measured_at > evaluate_every_s:
                measure()
                measured_at = last = time.monotonic()  # evaluation is not training time
        save()
        measure()
    if world > 1:
        dist.barrier()  # no process leaves while rank 0 still evaluates
        # Delete the wrapper before the process group: otherwise its destructor ends the group while it holds Python's
        # lock, for which gloo's own threads may wait, and the process hangs.
        del model
        dist.destroy_process_group()
    return averages, run


def _agreed(value: float, world: int, device: torch.device) -> float:
    """Return rank 0's value, for what all processes must decide alike, such as when to stop."""
    if world == 1:
        return value
    own = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(own, 0)
    return float(own)


def _added(values: Tensor, world: int, device: torch.device) -> Tensor:
    """Return the sums of `values` over all processes, each of which sees the loss of its share alone."""
    if world > 1:
        dist.all_reduce(values := values.to(device))
    return values
