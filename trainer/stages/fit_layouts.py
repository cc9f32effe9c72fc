"""Fits the layout network to the positions of objects. To resume, run the same command again.

Knows no picture and no denoiser; always runs on the CPU.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from shared.checkpoint import load, path_of, publish, read_info, reconfigure
from shared.device import autocast_dtype, kept_memory
from shared.diffusion.layouts import LAYOUTS, OUTSIDE, LayoutConfig, LayoutNetwork
from shared.registry import resolve, scan
from shared.storage import Location
from shared.vocabulary import Vocabulary
from trainer.averages import warmed_up_average
from trainer.config import TrainConfig
from trainer.data import Dataset, positions_of
from trainer.errors import TrainerError
from trainer.runs import LOG_EVERY, SAVE_EVERY_S, Budget, Run, load_state, rate_share, run_log, save_state, step_seed

OBJECTS: Final = 512  # in a batch, as many layouts as that makes
LR: Final = 1.5e-3
WARMUP_STEPS: Final = 100
COOLDOWN: Final = 0.6  # of the run: its last part, in which the rate falls to zero
HELD_OUT: Final = 20  # one layout of so many is not learnt from
EMA_DECAY: Final = 0.995
CHECK_EVERY: Final = 100  # steps
CHECKED: Final = 512  # held-out layouts of each number of objects, at most

Layout = tuple[Tensor, Tensor]  # labels (P, n) int64 and positions (P, n, 2) of pictures with n objects


def layouts_by_count(positions: Tensor) -> dict[int, Layout]:
    """Return the layouts of pictures with positions (P, K, 2), by their number of objects."""
    known = positions[..., 0] != OUTSIDE  # (P, K)
    counts, found = known.sum(1), {}
    for n in sorted({int(count) for count in counts} - {0}):
        there = known & (counts == n)[:, None]
        found[n] = torch.nonzero(there)[:, 1].view(-1, n), positions[there].view(-1, n, 2)
    return found


def shuffled(layouts: Layout, generator: torch.Generator) -> Layout:
    """Put each layout's objects in a random order."""
    indices, places = layouts
    order = torch.rand(indices.shape, generator=generator).argsort(1)
    return indices.gather(1, order), places.gather(1, order[..., None].expand(-1, -1, 2))


def split(layouts: Layout, seed: int) -> tuple[Layout, Layout]:
    """Return the layouts to learn from and those held out."""
    indices, places = layouts
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    held_out = min(len(order) // HELD_OUT, CHECKED)
    unseen, seen = order[:held_out], order[held_out:]
    return (indices[seen], places[seen]), (indices[unseen], places[unseen])


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the steps are so small that several wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Best:
    """The weights with the smallest held-out loss so far."""

    weights: dict[str, Tensor]
    loss: float = math.inf


def fit_layouts_of(
    dataset: Dataset, config: TrainConfig, folder: Path, *, on_step: Callable[[Run], None] = lambda _: None
) -> LayoutNetwork | None:
    """Fit the layout network of a training run to its `typical` pictures. None for a run without positions."""
    positions = positions_of(config, dataset)
    if positions is None:
        return None
    if dataset.typical is not None:
        positions = positions[dataset.typical]
    return fit_layouts(
        positions, dataset.vocabulary, folder, steps=config.layout_steps, seed=config.seed, on_step=on_step
    )


def fit_layouts(
    positions: Tensor, vocabulary: Vocabulary, folder: Path, *, steps: int, seed: int = 0,
    shape: Mapping[str, Any] | None = None, on_step: Callable[[Run], None] = lambda _: None,
) -> LayoutNetwork:  # fmt: skip
    """Train for `steps`, and return the averaged network at the step that knew held-out layouts best.

    positions (P, K, 2). `shape`: fields of LayoutConfig that differ from its defaults. State and log go to `folder`:
    the loss, and that of held-out layouts of n objects, in nats an object.
    """
    parts = {n: split(one, seed) for n, one in layouts_by_count(positions).items()}
    if not parts:
        raise TrainerError("there are no layouts to learn: no picture has labels with positions")
    numbers = list(parts)
    shares = torch.tensor([float(len(seen[0])) for seen, _ in parts.values()])
    torch.manual_seed(seed)
    network = LayoutNetwork(
        LayoutConfig.model_validate({**(shape or {}), "num_labels": len(vocabulary), "most": numbers[-1]})
    )
    average = AveragedModel(network, multi_avg_fn=warmed_up_average(EMA_DECAY))
    optimizer = torch.optim.AdamW(network.parameters(), LR, (0.9, 0.99), weight_decay=0.01)
    learning: dict[str, Any] = {"network": network, "average": average, "optimizer": optimizer}
    best, dtype = Best(average.module.state_dict()), autocast_dtype(torch.device("cpu"))
    budget, run, state_path = Budget(steps=steps), Run(), folder / "state.pt"
    digest = hashlib.sha256(positions.contiguous().numpy().data).hexdigest()
    recipe = {"data": digest, "steps": steps, "seed": seed, **network.config.model_dump()}
    folder.mkdir(parents=True, exist_ok=True)
    if state_path.exists():
        state = load_state(state_path, "layout network", network, recipe, vocabulary, run)
        for key, part in learning.items():
            part.load_state_dict(state[key])
        best = Best(state["best"], state["best_loss"])

    def save() -> None:
        now = {key: part.state_dict() for key, part in learning.items()}
        save_state(state_path, recipe, vocabulary, run, {**now, "best": best.weights, "best_loss": best.loss})

    def check() -> None:
        figures = _held_out_losses(average.module.eval(), {n: unseen for n, (_, unseen) in parts.items()}, seed)
        record(run, {f"held_out_loss/{n}": loss for n, loss in figures.items()})
        weights = [float(shares[numbers.index(n)]) for n in figures]
        loss = sum(w * one for w, one in zip(weights, figures.values(), strict=True)) / sum(weights) if figures else 0.0
        if loss <= best.loss:
            best.weights, best.loss = copy.deepcopy(average.module.state_dict()), loss

    with kept_memory(), one_thread(), run_log(folder) as record:
        last = saved_at = time.monotonic()
        losses: list[float] = []  # since the last line of the log
        while (progress := budget.progress(run.elapsed_s, run.step)) < 1:
            generator = torch.manual_seed(step_seed(seed, run.step))  # the global one, which dropout draws from
            n = numbers[int(torch.multinomial(shares, 1, generator=generator))]  # a batch's layouts have one size
            indices, places = parts[n][0]
            chosen = torch.randint(len(indices), (max(1, OBJECTS // n),), generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = LR * rate_share(run.step, progress, WARMUP_STEPS, COOLDOWN)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = network(*shuffled((indices[chosen], places[chosen]), generator)).mean()
            loss.backward()
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
            if run.step % CHECK_EVERY == 0 or run.step == steps:
                check()
            on_step(run)
            if now - saved_at > SAVE_EVERY_S:
                save()
                saved_at = time.monotonic()
        save()
    network.load_state_dict(best.weights)
    return network.eval()


def replace_layouts(storage: Location, name: str, layouts: LayoutNetwork, training: Mapping[str, Any]) -> Location:
    """Publish a denoiser with another layout network, and make its adapters refer to it: their weights still fit."""
    info, weights = load(resolve(storage, name, "denoiser"))
    tensors = {key: value for key, value in weights.items() if not key.startswith(LAYOUTS)}
    tensors |= {f"{LAYOUTS}{key}": value.to(torch.bfloat16) for key, value in layouts.state_dict().items()}
    described = {"layouts": layouts.config.model_dump(mode="json")}
    adapters = [one for one in scan(storage)[0] if one.config.get("base") == {"name": info.name, "digest": info.digest}]
    path = publish(
        storage, info.name, tensors, kind="denoiser", vocabulary=info.vocabulary, config={**info.config, **described},
        training={**info.training, **training},
    )  # fmt: skip
    base = {"name": info.name, "digest": read_info(path).digest}
    for adapter in adapters:
        reconfigure(path_of(storage, adapter.name), lambda _: {**described, "base": base})
    return path


def _held_out_losses(network: nn.Module, layouts: dict[int, Layout], seed: int) -> dict[int, float]:
    """Return the loss of held-out layouts by their number of objects, in the same random orders each time."""
    generator, losses = torch.Generator().manual_seed(seed), {}
    with torch.inference_mode():
        for n, part in layouts.items():
            if len(part[0]):
                losses[n] = float(network(*shuffled(part, generator)).mean())
    return losses
