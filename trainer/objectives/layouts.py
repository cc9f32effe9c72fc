"""Trains the layout network on the positions of objects. Knows no picture and no denoiser; runs on the CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from shared.checkpoint import CheckpointInfo, load, path_of, publish, read_info, reconfigure
from shared.diffusion.layout_draws import LayoutDrawer
from shared.diffusion.layouts import LAYOUTS, OUTSIDE, LayoutConfig, LayoutNetwork
from shared.options import Count, Natural
from shared.registry import resolve, scan
from shared.storage import Location
from shared.vocabulary import Vocabulary
from trainer.config import Positive, RunConfig, Share, TrainConfig
from trainer.data import Dataset, positions_of
from trainer.errors import TrainerError
from trainer.processes import Processes, processes
from trainer.runs import Budget, Run
from trainer.train import train

HELD_OUT: Final = 20  # one layout of so many is not learnt from
CHECKED: Final = 512  # held-out layouts of each number of objects, at most
SHARE_OF_MINUTES: Final = 0.1  # of a denoiser's run, that its layout network may take besides

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


class LayoutsConfig(RunConfig):
    """A run of the layout network. `network` holds those fields of LayoutConfig that do not follow from the data."""

    network: dict[str, Any] = Field(default_factory=dict)
    batch: Count = 512  # objects; a batch has as many layouts as that makes
    lr: Positive = 1.5e-3
    warmup_steps: Natural = 100
    cooldown: Share = 0.6
    evaluate_every: Count = 100  # steps


class Arranging:
    """The objective: the positions of objects given their labels, one object after the other.

    positions (P, K, 2).
    """

    name = "layouts"

    def __init__(self, positions: Tensor, vocabulary: Vocabulary, config: LayoutsConfig) -> None:
        self.vocabulary, self.config = vocabulary, config
        parts = {n: split(one, config.seed) for n, one in layouts_by_count(positions).items()}
        if not parts:
            raise TrainerError("there are no layouts to learn: no picture has labels with positions")
        self.seen, self.held_out = ({n: pair[i] for n, pair in parts.items()} for i in (0, 1))
        self.numbers = torch.cat([torch.full((len(indices),), n) for n, (indices, _) in self.seen.items()])
        learnt = hashlib.sha256(f"{vocabulary.names}".encode() + positions.contiguous().numpy().data)
        self.source = {"data set": learnt.hexdigest()}

    def __len__(self) -> int:
        return len(self.numbers)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw layouts with as many objects as the first of the examples has, since those of a batch need one size."""
        n = int(self.numbers[index[0]])
        indices, places = self.seen[n]
        chosen = torch.randint(len(indices), (max(1, len(index) // n),), generator=generator)
        own = slice(share.start // n, max(share.start // n + 1, share.stop // n))
        return [part[own] for part in shuffled((indices[chosen], places[chosen]), generator)]

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the mean -log p of an object's position, in nats."""
        loss: Tensor = network(*inputs).mean()
        return loss

    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        """Return the loss of held-out layouts, and of those with n objects, in the same random orders each time."""
        generator, losses = torch.Generator().manual_seed(self.config.seed), dict[int, float]()
        with torch.inference_mode():
            for n, layouts in self.held_out.items():
                if len(layouts[0]):
                    losses[n] = float(network(*shuffled(layouts, generator)).mean())
        if not losses:
            return {}
        weights = {n: len(self.seen[n][0]) for n in losses}
        total = sum(weights[n] * loss for n, loss in losses.items()) / sum(weights.values())
        return {**{f"held_out_loss/{n}": loss for n, loss in losses.items()}, "held_out_loss": total}

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        return replace_layouts(storage, name, cast(LayoutNetwork, network), training)


def make_network(objective: Arranging) -> LayoutNetwork:
    own = {"num_labels": len(objective.vocabulary), "most": max(objective.seen)}
    if given := own.keys() & objective.config.network:
        raise TrainerError(f"network.{min(given)} cannot be set: it follows from the data")
    config = LayoutConfig.model_validate({**objective.config.network, **own})
    torch.manual_seed(objective.config.seed)
    return LayoutNetwork(config)


def start_from(network: LayoutNetwork, storage: Location, name: str, vocabulary: Vocabulary) -> None:
    """Give the run's network the weights of a denoiser's layout network, which may know other numbers of objects."""
    info, weights = load(resolve(storage, name, "denoiser"))
    if info.vocabulary != vocabulary.names:
        raise TrainerError(f"{name} has another vocabulary than the data set; it cannot be started from")
    check_own_layouts(info)
    former, same = LayoutConfig.model_validate(info.config["layouts"]), {"most": 1, "dropout": 0.0}
    if former.model_copy(update=same) != network.config.model_copy(update=same):
        raise TrainerError(f"{name} has a layout network of another shape, {former.model_dump_json()}")
    found = {key.removeprefix(LAYOUTS): value for key, value in weights.items() if key.startswith(LAYOUTS)}
    counts, known = network.count.weight.detach().clone(), min(former.most, network.config.most) + 1
    counts[:known] = found["count.weight"][:known]
    network.load_state_dict({**found, "count.weight": counts})


def fit_layouts(
    objective: Arranging, network: LayoutNetwork, folder: Path, budget: Budget, **options: Any
) -> tuple[LayoutNetwork, Run, int]:
    """Train, and return the averaged network at the step that knew held-out layouts best, with the run and that step.

    Of several processes the first one trains, since a step is too small to share. `options`: those of `train`.
    """
    cpu, threads = torch.device("cpu"), torch.get_num_threads()

    def fit() -> tuple[dict[str, Tensor], Run, int]:
        torch.set_num_threads(1)  # the steps are so small that several threads wait for each other most of the time
        try:
            training = train(
                objective, network, objective.config, folder, budget, device=cpu, group=Processes(), **options
            )
        finally:
            torch.set_num_threads(threads)
        if best := training.best:
            return best.weights, training.run, best.step
        return training.averaged.state_dict(), training.run, training.run.step

    with processes(cpu) as group:
        weights, run, step = group.from_first(fit)
    fitted = LayoutNetwork(network.config)
    fitted.load_state_dict(weights)
    return fitted.eval(), run, step


def fit_layouts_of(
    dataset: Dataset, config: TrainConfig, folder: Path, budget: Budget,
    on_step: Callable[[Run], None] = lambda _: None,
) -> LayoutDrawer | None:  # fmt: skip
    """Fit the layout network of a denoiser's run to its `typical` pictures. None for a run without positions.

    It takes at most `config.layout_steps`, as many steps as the run, and a tenth of the run's minutes besides.
    """
    positions = positions_of(config, dataset)
    if positions is None:
        return None
    if dataset.typical is not None:
        positions = positions[dataset.typical]
    objective = Arranging(positions, dataset.vocabulary, LayoutsConfig(seed=config.seed))
    minutes = budget.minutes and budget.minutes * SHARE_OF_MINUTES
    own = Budget(minutes, min(config.layout_steps, budget.steps or config.layout_steps))
    return LayoutDrawer(fit_layouts(objective, make_network(objective), folder, own, on_step=on_step)[0])


def check_own_layouts(info: CheckpointInfo) -> None:
    if "layouts" not in info.config or "base" in info.config:
        raise TrainerError(f"{info.name} has no layout network of its own: it takes no positions, or is an adapter")


def replace_layouts(storage: Location, name: str, layouts: LayoutNetwork, training: dict[str, Any]) -> Location:
    """Publish a denoiser with another layout network, and make its adapters refer to it: their weights still fit."""
    info, weights = load(resolve(storage, name, "denoiser"))
    tensors = {key: value for key, value in weights.items() if not key.startswith(LAYOUTS)}
    tensors |= {f"{LAYOUTS}{key}": value.to(torch.bfloat16) for key, value in layouts.state_dict().items()}
    described = {"layouts": layouts.config.model_dump(mode="json")}
    base = {"name": info.name, "digest": info.digest}
    adapters = [one for one in scan(storage).infos if one.config.get("base") == base]
    path = publish(
        storage, info.name, tensors, kind="denoiser", vocabulary=info.vocabulary, config={**info.config, **described},
        training={**info.training, "layouts": training},
    )  # fmt: skip
    base = {"name": info.name, "digest": read_info(path).digest}
    for adapter in adapters:
        reconfigure(path_of(storage, adapter.name), lambda _: {**described, "base": base})
    return path
