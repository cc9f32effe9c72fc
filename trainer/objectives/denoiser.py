"""Trains the denoiser: to tell what is in a noised picture of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor, nn

from shared.checkpoint import load, publish
from shared.device import fast
from shared.diffusion.inputs import with_inputs
from shared.diffusion.layout_draws import LayoutDrawer
from shared.diffusion.layouts import LAYOUTS, OUTSIDE, nearest_pair, with_positions
from shared.diffusion.path import NoisePath
from shared.diffusion.unet import NetworkConfig, UNet
from shared.options import WITH_POSITIONS
from shared.registry import resolve
from shared.storage import Location
from shared.support import Support
from trainer.config import TrainConfig
from trainer.data import Dataset, positions_of, rotations_of, to_float
from trainer.errors import TrainerError
from trainer.loss import draw_noise, draw_timesteps, loss_weights, noise_level_weights
from trainer.runs import Run


class Denoising:
    """The objective: predict noise and picture (`predictions.py`) from a noised picture.

    `watch` gives the figures of the log. `layouts`: of the layout network that is published with a network that takes
    positions.
    """

    name = "denoiser"

    def __init__(
        self, dataset: Dataset, config: TrainConfig, device: torch.device,
        watch: Callable[[nn.Module, Run], dict[str, float]] | None = None, layouts: LayoutDrawer | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.config, self.watch, self.layouts = dataset, config, watch, layouts
        self.device = device
        self.source: dict[str, Any] = {"data set": dataset.digest}
        self.positions, self.rotations = positions_of(config, dataset), rotations_of(config, dataset)
        path = path_of(config)
        self.levels = noise_level_weights(config, path.alpha_bar)  # stays on the CPU, where t is drawn
        columns = path.signal, path.noise, *path.target, loss_weights(config, path.alpha_bar)
        self.columns = torch.stack(columns, 1).float().to(device)  # (T, 5)

    def __len__(self) -> int:
        return len(self.dataset)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw x_0, labels, t, eps, and whether labels are kept."""
        B, images = len(index), self.dataset.images[index[share]]
        t = draw_timesteps(self.config, self.levels, B, generator)
        seeds = torch.randint(2**62, (B,), generator=generator)[share]
        drawn = torch.rand(B if self.config.label_dropout_by == "picture" else 1, generator=generator)
        labels = self.dataset.labels[index[share]]
        keep = (drawn >= self.config.label_dropout).expand(B)[share] & labels.any(1)  # not those of unknown labels
        if self.positions is not None:
            known = torch.rand(B, 1, 1, generator=generator)[share] >= self.config.position_dropout
            rotations = None if self.rotations is None else self.rotations[index[share]] * known
            positions = self.positions[index[share]].where(known, torch.tensor(OUTSIDE))
            labels = with_positions(labels, positions, rotations)
        if self.dataset.inputs:
            given = torch.rand(B, 1, generator=generator)[share] >= self.config.position_dropout
            inputs = {
                name: values[index[share]].where(given, torch.nan) for name, values in self.dataset.inputs.items()
            }
            labels = with_inputs(labels, inputs, tuple(inputs))
        return [to_float(images), labels, t[share], draw_noise(seeds, images.shape[1:], self.device), keep]

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the mean weighted squared error."""
        x_0, labels, t, eps, keep = inputs
        a, s, of_x_0, of_eps, weights = self.columns[t].T[:, :, None, None, None]  # (B, 1, 1, 1) each
        target = of_x_0 * x_0 + of_eps * eps
        error = (network(a * x_0 + s * eps, t, labels, keep).float() - target).square().mean((1, 2, 3))
        loss: Tensor = (error * weights.flatten()).mean()
        return loss

    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        return self.watch(network, run) if self.watch else {}

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        """Write bf16 weights and the whole configuration to storage, atomically."""
        state = dict(network.state_dict())
        described = checkpoint_config(self.config, cast(UNet, network), self.dataset.aspect)
        described["support"] = support_of(self.dataset, self.positions).model_dump(mode="json")
        if self.layouts is not None:
            fitted = self.layouts.network
            state |= {f"{LAYOUTS}{key}": value for key, value in fitted.state_dict().items()}
            described["layouts"] = fitted.config.model_dump(mode="json")
            described["sampling"] = WITH_POSITIONS.model_dump(mode="json")
        return publish(
            storage, name, {key: value.detach().to("cpu", torch.bfloat16) for key, value in state.items()},
            kind="denoiser", vocabulary=self.dataset.vocabulary.names, config=described, training=training,
        )  # fmt: skip


@torch.inference_mode()
def fixed_loss(network: nn.Module, objective: Denoising, *, batch: int, most: int = 1024) -> float:
    """Return the mean loss of up to `most` evenly spaced examples, with the same noise and timesteps in every call.

    `network` is in evaluation mode.
    """
    count, generator = min(len(objective), most), torch.Generator().manual_seed(0)
    device, total = next(network.parameters()).device, 0.0
    for index in torch.split(torch.linspace(0, len(objective) - 1, count).long(), batch):
        inputs = [value.to(device) for value in objective.draw(index, slice(0, len(index)), generator)]
        with fast(device):
            total += len(index) * float(objective(network, *inputs))
    return total / count


def path_of(config: TrainConfig) -> NoisePath:
    return NoisePath.of(config.schedule, config.timesteps, config.prediction)


def make_network(config: TrainConfig, dataset: Dataset) -> UNet:
    own: dict[str, Any] = {"spread": round(dataset.object_size / 2, 4)} if dataset.object_size else {}
    rotations = rotations_of(config, dataset)
    network = NetworkConfig(
        num_labels=len(dataset.vocabulary), image_size=config.image_size,
        positions=positions_of(config, dataset) is not None, rotations=rotations is not None,
        symmetric=() if rotations is None else symmetric_labels(rotations), inputs=tuple(dataset.inputs),
        **own, **config.network,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    unet = UNet(network)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return unet


def symmetric_labels(rotations: Tensor) -> tuple[int, ...]:
    """Return the labels, by index, none of whose objects has a known rotation: (N, K, 2) as in `Dataset`."""
    has_none = ~rotations.any(-1).any(0)
    return tuple(has_none.nonzero()[:, 0].tolist())


def checkpoint_config(config: TrainConfig, network: UNet, aspect: float) -> dict[str, Any]:
    """Return the fields from which `shared.diffusion.model.load_denoiser` rebuilds the denoiser."""
    return {
        "network": network.config.model_dump(mode="json"),
        "schedule": config.schedule,
        "timesteps": config.timesteps,
        "prediction": config.prediction,
        "aspect": aspect,
    }


def support_of(dataset: Dataset, positions: Tensor | None) -> Support:
    """Return what a network has learnt from the data set: numbers of objects and, with positions, their places."""
    counts = dataset.labels.sum(1)
    objects = int(counts[counts > 0].min()), int(counts.max())
    if positions is None:
        return Support(objects=objects)
    known = positions[..., 0] != OUTSIDE
    pairs = (nearest_pair(places[there]) for places, there in zip(positions, known, strict=True))
    nearest = min((distance for distance in pairs if math.isfinite(distance)), default=None)
    return Support(objects=objects, area=tuple(convex_hull(positions[known])), nearest=nearest)


def convex_hull(points: Tensor) -> list[tuple[float, float]]:
    """Return the corners of the smallest convex area that holds all points (N, 2), by increasing angle."""
    distinct = np.unique(points.double().numpy().round(4), axis=0)
    try:
        corners = distinct[ConvexHull(distinct).vertices]
    except QhullError:  # they are on one line
        corners = distinct[[0, -1]][: len(distinct)]  # of a single point: this one
    return [(x, y) for x, y in corners.tolist()]


def start_from(network: UNet, storage: Location, name: str, config: TrainConfig, dataset: Dataset) -> None:
    """Give the run's network the weights of a published denoiser.

    The network may also take positions, rotations and inputs, and may have more blocks in each level; what the
    published one lacks stays random. A new block starts as the identity (Chen et al. 2016, "Net2Net", sec. 2.3), since
    its last convolution is zero.
    """
    info, weights = load(resolve(storage, name, "denoiser"))
    if base := info.config.get("base"):
        raise TrainerError(f"{name} is an adapter; start from the checkpoint that it changes, {base['name']}")
    if info.vocabulary != dataset.vocabulary.names:
        raise TrainerError(f"{name} has another vocabulary than the data set; it cannot be started from")
    wanted = checkpoint_config(config, network, dataset.aspect)
    former = NetworkConfig.model_validate(info.config["network"])
    more = ("positions", "rotations", "symmetric", "inputs")
    former = former.model_copy(update={key: getattr(network.config, key) for key in more if wanted["network"].get(key)})
    former = former.model_copy(update=_more_blocks(former, network.config))
    found = {"aspect": dataset.aspect, **info.config, "network": former.model_dump(mode="json")}
    if different := [key for key in wanted if wanted[key] != found.get(key)]:
        raise TrainerError(f"{name} has another {', '.join(different)} than this run; it cannot be started from")
    own = {key: value for key, value in weights.items() if not key.startswith(LAYOUTS)}  # the run has its own
    network.load_state_dict({**network.state_dict(), **own})


def _more_blocks(found: NetworkConfig, wanted: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Return the numbers of blocks of `wanted` where none is smaller and the levels are as many."""
    numbers = {side: (getattr(found, side), getattr(wanted, side)) for side in ("encoder_blocks", "decoder_blocks")}
    return {
        side: new for side, (old, new) in numbers.items()
        if len(old) == len(new) and all(more >= blocks for blocks, more in zip(old, new, strict=True))
    }  # fmt: skip
