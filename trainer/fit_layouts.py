"""Fits the layout network to the positions of a data set. To resume, run the same command again.

It learns the pictures that `Dataset.typical` marks. Knows no picture and no denoiser; always runs on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shared.diffusion.layouts import OUTSIDE, LayoutConfig, LayoutNetwork
from trainer.config import TrainConfig
from trainer.data import Dataset, positions_of
from trainer.runs import LOG_EVERY, SAVE_EVERY_S, Budget, Run, load_state, run_log, save_state, step_seed

BATCH: Final = 128
LR: Final = 1.5e-3
WARMUP_STEPS: Final = 100
HELD_OUT: Final = 20  # one layout of so many is not learnt from
EMA_DECAY: Final = 0.998

Batch = tuple[Tensor, Tensor, Tensor]  # indices (B, N), positions (B, N, 2), there (B, N): LayoutNetwork's input


def layouts_of(labels: Tensor, positions: Tensor) -> Batch:
    """Return the layouts of P pictures, padded to the largest: labels (P, K), positions (P, K, 2)."""
    known = (labels > 0) & (positions[..., 0] != OUTSIDE)  # (P, K)
    counts = known.sum(1)
    most = int(counts.max())
    there = torch.arange(most) < counts[:, None]
    indices, places = torch.zeros(len(labels), most, dtype=torch.int64), torch.zeros(len(labels), most, 2)
    indices[there], places[there] = torch.nonzero(known)[:, 1], positions[known]
    return indices, places, there


def shuffled(layouts: Batch, generator: torch.Generator) -> Batch:
    """Put each layout's objects in a random order; padding stays last."""
    indices, places, there = layouts
    keys = torch.rand(there.shape, generator=generator) + 2 * ~there
    order = keys.argsort(1)
    return indices.gather(1, order), places.gather(1, order[..., None].expand(-1, -1, 2)), there


def update_average(averaged: Any, current: Any, updates: Tensor | int) -> None:
    """Update the average, with less decay at first, so that a short run's average forgets the random weights."""
    decay = min(EMA_DECAY, (1 + int(updates)) / (10 + int(updates)))
    get_ema_multi_avg_fn(decay)(averaged, current, updates)  # type: ignore[no-untyped-call]


def fit_layouts(
    dataset: Dataset, config: TrainConfig, folder: Path, *, on_step: Callable[[Run], None] = lambda _: None
) -> LayoutNetwork | None:
    """Train for `config.layout_steps` and return the averaged network, or None for a run without positions.

    State and log go to `folder`: the loss and, at the end, that of held-out layouts, in nats an object.
    """
    positions = positions_of(config, dataset)
    if positions is None:
        return None
    typical = torch.ones(len(dataset), dtype=torch.bool) if dataset.typical is None else dataset.typical
    layouts = layouts_of(dataset.labels[typical], positions[typical])
    torch.manual_seed(config.seed)
    network = LayoutNetwork(LayoutConfig(num_labels=len(dataset.vocabulary), most=layouts[0].shape[1]))
    average = AveragedModel(network, multi_avg_fn=update_average)
    optimizer = torch.optim.AdamW(network.parameters(), LR, (0.9, 0.99), weight_decay=0.01)
    learning: dict[str, Any] = {"network": network, "average": average, "optimizer": optimizer}
    budget, run, state_path = Budget(steps=config.layout_steps), Run(), folder / "state.pt"
    recipe = {"data": dataset.digest, "steps": config.layout_steps, "seed": config.seed}
    folder.mkdir(parents=True, exist_ok=True)
    if state_path.exists():
        state = load_state(state_path, recipe, dataset.vocabulary, run, torch.device("cpu"))
        for key, part in learning.items():
            part.load_state_dict(state[key])

    def save() -> None:
        parts = {key: part.state_dict() for key, part in learning.items()}
        save_state(state_path, recipe, dataset.vocabulary, run, parts)

    order = torch.randperm(len(layouts[0]), generator=torch.Generator().manual_seed(config.seed))
    held_out, learnt = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    with run_log(folder) as record:
        last = saved_at = time.monotonic()
        losses: list[float] = []  # since the last line of the log
        while (progress := budget.progress(run.elapsed_s, run.step)) < 1:
            generator = torch.Generator().manual_seed(step_seed(config.seed, run.step))
            chosen = learnt[torch.randint(len(learnt), (BATCH,), generator=generator)]
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, (run.step + 1) / WARMUP_STEPS) * min(1.0, (1 - progress) / 0.5)
            loss = _mean_loss(network, shuffled(_rows(layouts, chosen), generator))
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(network)

            now = time.monotonic()
            run.step, run.elapsed_s, run.progress, last = run.step + 1, run.elapsed_s + now - last, progress, now
            losses.append(float(loss.detach()))
            if run.step % LOG_EVERY == 0:
                run.loss = sum(losses) / len(losses)
                losses.clear()
                record(run, {"loss": run.loss})
            on_step(run)
            if now - saved_at > SAVE_EVERY_S:
                save()
                saved_at = time.monotonic()
        save()
        fitted = cast(LayoutNetwork, average.module.eval())
        if len(held_out):
            with torch.inference_mode():
                rows = shuffled(_rows(layouts, held_out), torch.Generator().manual_seed(config.seed))
                record(run, {"held_out_loss": float(_mean_loss(fitted, rows))})
    return fitted


def _rows(layouts: Batch, chosen: Tensor) -> Batch:
    """Return the chosen layouts, without the padding that none of them needs."""
    indices, places, there = (part[chosen] for part in layouts)
    most = int(there.sum(1).max())
    return indices[:, :most], places[:, :most], there[:, :most]


def _mean_loss(network: LayoutNetwork, layouts: Batch) -> Tensor:
    """Return the mean of -log p over all objects."""
    loss: Tensor = network(*layouts).sum() / layouts[2].sum()
    return loss
