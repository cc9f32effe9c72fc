"""Trains an upsampler on pairs of a picture and its squeezed copy, and publishes it as an adapter of a denoiser.

The denoiser's own weights stay as they are. Conditioning augmentation (Ho et al. 2022, sec. 4) makes the squeezed
copies resemble what the denoiser samples: many of them are noised and go through its own last sampling steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from shared.checkpoint import CheckpointInfo, base_of, load, publish, read_info
from shared.device import autocast_dtype
from shared.diffusion.denoise import take_steps
from shared.diffusion.layouts import with_positions
from shared.diffusion.model import UPSAMPLER, Denoiser
from shared.diffusion.samplers import make_table
from shared.diffusion.upsampler import UpsamplerConfig, UpsamplerNet, crop
from shared.options import Count, Natural
from shared.pictures import grid
from shared.registry import resolve
from shared.storage import Location
from trainer.config import RunConfig, Share
from trainer.data import Dataset, check_labelled, in_vocabulary, to_float
from trainer.errors import TrainerError
from trainer.full_size import Pictures, as_tensor
from trainer.loss import finite
from trainer.runs import Run, log_samples
from trainer.stages.octaves import octave_power
from trainer.stages.patches import random_directions, sliced_distance

Weight = Annotated[float, Field(ge=0)]
# As a folder's pictures are read (`data.py`), and as `trainer render --size` writes them
SQUEEZES: Final = (Image.Resampling.BILINEAR, Image.Resampling.BOX)
HELD_OUT_EVERY = 50  # one picture in so many is not trained on
SHOWN, MEASURED = 4, 48  # held-out pictures in a sample grid, and in the figures of the log


class UpsampleConfig(RunConfig):
    """One run. `network` holds those fields of UpsamplerConfig that do not follow from the data."""

    network: dict[str, Any] = Field(default_factory=dict)
    batch: Count = 4
    optimizer: Literal["auto", "adamw", "muon"] = "auto"
    warmup_steps: Natural = 50
    cooldown: Share = 0.4
    crop: Annotated[int, Field(ge=4)] = 24  # side, in blocks, of the squares that are compared
    squares: Count = 4  # of each picture
    denoised: Share = 0.85  # share of inputs that are noised, and sampled from there
    noisiest: Share = 0.55  # of T: the most noise that they are sampled from
    noise: Weight = 0.02  # largest standard deviation of the noise on other inputs
    octave_weight: Weight = 0.02  # of the error of the power in each octave, a logarithm
    patch_weight: Weight = 10.0  # of the distance between the patches of the same windows (`patches.py`)


class Upsampling:
    """The objective: restore squares of pictures from the whole picture, squeezed and degraded."""

    def __init__(
        self, dataset: Dataset, pictures: Pictures, base: Denoiser, network: UpsamplerConfig, config: UpsampleConfig
    ) -> None:  # fmt: skip
        dataset = in_vocabulary(dataset, base.vocabulary, base.info.name)
        self.dataset, self.pictures, self.config, self.block = dataset, pictures, config, network.block
        self.places = [side // network.block - config.crop for side in reversed(pictures.size)]  # rows, columns
        if min(self.places) < 0:
            raise TrainerError(f"pictures of {pictures.size} pixels are smaller than crop={config.crop} blocks")
        check_labelled(dataset, "pictures")
        known = dataset.labels.any(1).nonzero()[:, 0]  # the denoiser samples nothing without labels
        self.held_out = known[::HELD_OUT_EVERY]
        trained = known[torch.arange(len(known)) % HELD_OUT_EVERY != 0]
        self.trained = trained if len(trained) else known
        self.side, self.stepper, self.options = base.image_shape[-1], base.stepper(), base.options
        timesteps = [t for t, *_ in make_table(base.options, base.alpha_bar).rows]
        self.starts = [k for k, t in enumerate(timesteps) if t <= config.noisiest * len(base.alpha_bar)]
        if not self.starts:
            raise TrainerError(f"{base.info.name} has no sampling step below noisiest={config.noisiest} of T")
        self.labels = dataset.labels
        if base.layouts is not None:
            if dataset.positions is None:
                raise TrainerError(f"{base.info.name} takes positions; write the data set's with `locate`")
            self.labels = with_positions(dataset.labels, dataset.positions, dataset.rotations)

    def __len__(self) -> int:
        return len(self.trained)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw inputs (squeezed pictures, labels, noise, its level, whether to denoise), the squares that are compared
        (their corners and pixels), and the directions in which their patches are.
        """
        B = len(index)
        chosen, eps = self.trained[index[share]], torch.randn(B, 3, self.side, self.side, generator=generator)[share]
        level, denoise, resampling = torch.rand(3, B, generator=generator)[:, share]
        places = torch.rand(B, 2 * self.config.squares, 2, generator=generator)[share]
        corners = (places * (torch.tensor(self.places) + 1)).long()
        squeezed, found = [], []
        for i, k, own in zip(chosen.tolist(), (resampling * len(SQUEEZES)).long().tolist(), corners, strict=True):
            picture = self.pictures.read(i)
            squeezed.append(self._squeeze(picture, SQUEEZES[k]))
            found.append(self._squares(as_tensor(picture), own))
        conditions = [self.labels[chosen], eps, level, denoise < self.config.denoised]
        compared = [torch.stack(values) for values in zip(*found, strict=True)]
        return [torch.stack(squeezed), *conditions, *compared, random_directions(B, generator)[share]]

    def _squeeze(self, picture: Image.Image, resampling: Image.Resampling) -> Tensor:
        return as_tensor(picture.resize((self.side, self.side), resampling))

    def _squares(self, picture: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
        """Return the half of `corners` whose squares have most edges, since a picture may be mostly background."""
        squares = crop(picture[None], corners[None] * self.block, self.config.crop * self.block)
        edges = squares.float().diff(dim=-1).abs().mean((1, 2, 3))
        best = edges.topk(self.config.squares).indices
        return corners[best], squares[best]

    def degrade(self, x: Tensor, labels: Tensor, eps: Tensor, level: Tensor, denoise: Tensor) -> Tensor:
        """Return x (B, 3, S, S) with some noise or, where `denoise`, as sampled from a noised copy of it."""
        x = x + (self.config.noise * level * ~denoise)[:, None, None, None] * eps
        starts = [self.starts[i] for i in (level * len(self.starts)).long().tolist()]
        rows = [
            self.stepper.noised_row(x[i], eps[i], labels[i], self.options, starts[i])
            for i in denoise.nonzero()[:, 0].tolist()
        ]
        take_steps(self.stepper, rows)
        if rows:
            x[denoise] = torch.stack([row.x for row in rows])
        return x

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        squeezed, labels, eps, level, denoise, corners, squares, directions = inputs
        made = network(self.degrade(to_float(squeezed), labels, eps, level, denoise), corners, self.config.crop)
        return finite(self.loss(made, to_float(squares.flatten(0, 1)), directions))

    def loss(self, made: Tensor, target: Tensor, directions: Tensor) -> Tensor:
        """Return the mean absolute error, with the errors of the octaves' power and of the patches."""
        loss = (made - target).abs().mean()
        if weight := self.config.octave_weight:
            loss = loss + weight * (octave_power(made) / octave_power(target)).log().abs().mean()
        if weight := self.config.patch_weight:
            loss = loss + weight * sliced_distance(made, target, directions.flatten(0, 1))
        return loss


@torch.inference_mode()
def measure(
    objective: Upsampling, folder: Path, device: torch.device, network: nn.Module, run: Run
) -> dict[str, float]:
    """Return figures of whole held-out pictures, and write some beside their originals to `folder`.

    l1: mean absolute error on [-1, 1]. octave_k: power in octave k (`octave_power`) relative to the originals'.
    """
    chosen = objective.held_out[:MEASURED]
    originals = [objective.pictures.read(i) for i in chosen.tolist()]
    squeezed = torch.stack([objective._squeeze(one, SQUEEZES[k % 2]) for k, one in enumerate(originals)])
    eps = torch.randn(squeezed.shape, generator=torch.Generator().manual_seed(0))
    level = torch.arange(len(chosen)) / len(chosen)
    drawn = (objective.labels[chosen], eps, level, torch.ones_like(level, dtype=torch.bool))
    x = objective.degrade(to_float(squeezed).to(device), *(value.to(device) for value in drawn))
    dtype = autocast_dtype(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        made = torch.cat([network(one[None]).cpu() for one in x])
    target = to_float(torch.stack([as_tensor(one) for one in originals]))
    ratios = octave_power(made) / octave_power(target)
    shown = torch.stack([made[:SHOWN], target[:SHOWN]], 1).flatten(0, 1)
    log_samples(folder, grid(shown, columns=2), run.step)
    figures = {"l1": float((made - target).abs().mean())}
    return figures | {f"octave_{k}": ratio for k, ratio in enumerate(ratios.tolist())}


def make_upsampler(base: Denoiser, size: tuple[int, int], config: UpsampleConfig) -> UpsamplerNet:
    """Return a new upsampler of `base`'s pictures to `size` (width, height): bicubic interpolation, before training.

    Raises TrainerError if the denoiser's pictures are not squeezed ones, pydantic.ValidationError for a bad size.
    """
    if base.aspect != 1:
        raise TrainerError(f"{base.info.name} learnt padded pictures; an upsampler needs squeezed ones (fit=squeeze)")
    torch.manual_seed(config.seed)
    return UpsamplerNet(UpsamplerConfig.model_validate({**config.network, "picture": size}))


def check_base(base: CheckpointInfo) -> None:
    """Raise TrainerError if no upsampler can be added to `base`, since it is an adapter itself."""
    if over := base_of(base):
        raise TrainerError(f"{base.name} is an adapter; add the upsampler to the checkpoint it changes, {over}")


def publish_upsampler(
    config: UpsamplerConfig, weights: dict[str, Tensor], base: CheckpointInfo, storage: Location, name: str,
    training: dict[str, Any],
) -> Location:  # fmt: skip
    """Publish an upsampler (`weights`: its state dict) in bf16 as an adapter of `base`, which it leaves as it is.

    Raises TrainerError as `check_base`.
    """
    check_base(base)
    described = {"base": {"name": base.name, "digest": base.digest}, "picture": list(config.picture)}
    described["upsampler"] = config.model_dump(mode="json")
    return publish(
        storage, name, {UPSAMPLER + key: value.detach().to("cpu", torch.bfloat16) for key, value in weights.items()},
        kind="denoiser", vocabulary=base.vocabulary, config={**base.config, **described}, training=training,
    )  # fmt: skip


def weights_of(storage: Location, name: str) -> tuple[CheckpointInfo, UpsamplerConfig, dict[str, Tensor]]:
    """Return a checkpoint's description, and the configuration and state dict of its upsampler.

    Raises TrainerError if it has none.
    """
    info, tensors = load(resolve(storage, name, "denoiser"))
    if "upsampler" not in info.config:
        raise TrainerError(f"{name} has no upsampler")
    weights = {key.removeprefix(UPSAMPLER): value for key, value in tensors.items() if key.startswith(UPSAMPLER)}
    return info, UpsamplerConfig.model_validate(info.config["upsampler"]), weights


def starting_weights(storage: Location, name: str, config: UpsamplerConfig) -> dict[str, Tensor]:
    """Return the state dict of a published upsampler, to start a run from. TrainerError if its shape is another."""
    _, found, weights = weights_of(storage, name)
    if found.model_copy(update={"picture": config.picture}) != config:
        raise TrainerError(f"{name} has an upsampler of another shape, {found.model_dump_json()}")
    return weights


def move_upsampler(storage: Location, source: str, base: str, name: str) -> Location:
    """Publish the upsampler of checkpoint `source` as that of `base`: after the base was trained again, for example.

    Raises TrainerError if `source` has none, or if `base` is an adapter.
    """
    info, config, weights = weights_of(storage, source)
    onto = read_info(resolve(storage, base, "denoiser"))
    return publish_upsampler(config, weights, onto, storage, name, info.training)
