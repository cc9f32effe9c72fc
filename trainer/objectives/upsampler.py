"""Trains an upsampler on pairs of a picture and its squeezed copy, and publishes it with its denoiser.

The denoiser's own weights stay as they are. Conditioning augmentation (Ho et al. 2022, sec. 4) makes the squeezed
copies resemble what the denoiser samples: many of them are noised and sampled anew, from any of its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import torch
import torch.distributed as dist
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checkpoint import publish
from shared.device import fast
from shared.diffusion.denoise import take_steps
from shared.diffusion.model import Denoiser, load_denoiser
from shared.diffusion.samplers import make_table
from shared.diffusion.upsampler import UpsamplerConfig, UpsamplerNet, crop
from shared.options import Count, Natural
from shared.pictures import grid
from shared.registry import resolve
from shared.storage import Location
from trainer.config import Positive, RunConfig, Share
from trainer.data import Dataset, as_tensor, check_labelled, in_vocabulary, layouts_of, merge, to_float
from trainer.data_folder import Pictures
from trainer.errors import TrainerError
from trainer.objectives.adversary import Adversaries
from trainer.objectives.sliced import sliced_distance
from trainer.objectives.whole import config_of, upsampler_config, upsampler_weights, weights_of
from trainer.runs import Run, log_samples

Weight = Annotated[float, Field(ge=0)]
# As a folder's pictures are read (`data.py`), and as `trainer render --size` writes them
SQUEEZES: Final = (Image.Resampling.BILINEAR, Image.Resampling.BOX)
HELD_OUT_EVERY = 50  # one scene in so many is not trained on, where no pictures are given for that
SHOWN, MEASURED = 4, 48  # held-out pictures in a sample grid, and in the figures of the log


class UpsampleConfig(RunConfig):
    """One run. `network` holds those fields of UpsamplerConfig that do not follow from the data."""

    network: dict[str, Any] = Field(default_factory=dict)
    batch: Count = 4
    optimizer: Literal["auto", "adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    betas: tuple[Share, Share] = (0.5, 0.99)  # a short memory, since the discriminator changes
    warmup_steps: Natural = 100
    cooldown: Share = 0.3
    clip_norm: Positive | None = None  # one for both networks would be the discriminator's
    crop: Annotated[int, Field(ge=4)] = 16  # side, in blocks, of the squares that are compared
    squares: Count = 4  # of each picture
    denoised: Share = 0.65  # share of inputs that are noised, and sampled from there
    noise: Weight = 0.01  # largest standard deviation of the noise on other inputs
    adversarial: Weight = 1.0  # of the adversarial loss's gradient, relative to that of the pixel loss
    levels: Weight = 1.5  # of 256: deviation of the noise that hides finer grain from the discriminator


def crop_places(pictures: Pictures, network: UpsamplerConfig, crop: int) -> list[int]:
    """Return the last row and column, in blocks, at which a square of `crop` blocks fits into the pictures.

    Raises TrainerError if none does.
    """
    places = [side // network.block - crop for side in reversed(pictures.size)]
    if min(places) < 0:
        raise TrainerError(f"pictures of {pictures.size} pixels are smaller than crop={crop} blocks")
    return places


class Upsampling:
    """The objective: restore squares of pictures from the whole picture, squeezed and degraded.

    `folder`: of the run, for sample grids. `unseen`: pictures that are measured and not trained on, the last of
    `pictures`; without them, some scenes of the data set.
    """

    name = "upsampler"

    def __init__(
        self, dataset: Dataset, pictures: Pictures, base: Denoiser, network: UpsamplerConfig, config: UpsampleConfig,
        folder: Path, unseen: Dataset | None = None,
    ) -> None:  # fmt: skip
        self.source = source_of(dataset, pictures, base, unseen)
        dataset = with_unseen(dataset, unseen, base)
        self.dataset, self.pictures, self.config, self.block = dataset, pictures, config, network.block
        self.base, self.network, self.folder = base, network, folder
        self.places = crop_places(pictures, network, config.crop)
        self.held_out, self.trained = split(dataset.labels, pictures.paths, len(unseen) if unseen else 0)
        self.side, self.stepper, self.options = base.image_shape[-1], base.stepper(), base.options
        timesteps = [t for t, *_ in make_table(base.options, base.alpha_bar).rows]
        self.left = torch.tensor([float(base.alpha_bar[t]) for t in timesteps])  # of a picture, by step
        self.labels = layouts_of(dataset, base)

    def __len__(self) -> int:
        return len(self.trained)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw inputs (squeezed pictures, labels, noise, its level, whether to denoise), the squares that are compared
        (their corners and pixels), and noise for the discriminator.
        """
        B, side = len(index), self.config.crop * self.block
        chosen, eps = self.trained[index[share]], torch.randn(B, 3, self.side, self.side, generator=generator)[share]
        level, denoise, resampling = torch.rand(3, B, generator=generator)[:, share]
        places = torch.rand(B, 2 * self.config.squares, 2, generator=generator)[share]
        corners = (places * (torch.tensor(self.places) + 1)).long()
        blurring = torch.randn(B, self.config.squares, 2, 3, side, side, generator=generator)[share]
        squeezed, found = [], []
        for i, k, own in zip(chosen.tolist(), (resampling * len(SQUEEZES)).long().tolist(), corners, strict=True):
            picture = self.pictures.read(i)
            squeezed.append(self._squeeze(picture, SQUEEZES[k]))
            found.append(self._squares(as_tensor(picture), own))
        conditions = [self.labels[chosen], eps, level, denoise < self.config.denoised]
        compared = [torch.stack(values) for values in zip(*found, strict=True)]
        return [torch.stack(squeezed), *conditions, *compared, blurring]

    def _squeeze(self, picture: Image.Image, resampling: Image.Resampling) -> Tensor:
        return as_tensor(picture.resize((self.side, self.side), resampling))

    def _squares(self, picture: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
        """Return the half of `corners` whose squares have most edges, since a picture may be mostly background."""
        squares = crop(picture[None], corners[None] * self.block, self.config.crop * self.block)
        edges = squares.float().diff(dim=-1).abs().mean((1, 2, 3))
        best = edges.topk(self.config.squares).indices
        return corners[best], squares[best]

    def degrade(
        self, x: Tensor, labels: Tensor, eps: Tensor, level: Tensor, denoise: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return x (N, 3, S, S) with some noise or, where `denoise`, as sampled from a noised copy of it.

        Also returns how much of x is left in each, (N,): alpha_bar of the copy.
        """
        x = x + (self.config.noise * level * ~denoise)[:, None, None, None] * eps
        left, again = torch.ones_like(level), denoise.nonzero()[:, 0].tolist()
        starts = [int(level[i] * len(self.left)) for i in again]
        rows = [
            self.stepper.noised_row(x[i], eps[i], labels[i], self.options, start)
            for i, start in zip(again, starts, strict=True)
        ]
        take_steps(self.stepper, rows)
        if rows:
            x[denoise] = torch.stack([row.x for row in rows])
            left[denoise] = self.left[starts].to(left)
        return x, left

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the sum of both networks' losses."""
        squeezed, labels, eps, level, denoise, corners, squares, noise = inputs
        x, left = self.degrade(to_float(squeezed), labels, eps, level, denoise)
        real = to_float(squares.flatten(0, 1))
        noise = self.config.levels / 127.5 * noise.flatten(0, 1).movedim(1, 0)
        made, adversarial, discriminating = network(x, corners, self.config.crop, real, noise)
        pixels = self.pixel_loss(made, real, x, left, corners)
        weight = self.config.adversarial * balance(pixels, adversarial, made)
        loss: Tensor = pixels + weight * adversarial + discriminating
        return loss

    def pixel_loss(self, made: Tensor, real: Tensor, x: Tensor, left: Tensor, corners: Tensor) -> Tensor:
        """Return the mean absolute error of squares, as far as a picture is `left` in its input.

        Where noise replaced most of it, the original shows another light and other edges than the input. There only
        mean colours count, against the input's.
        """
        left = left.repeat_interleave(corners.shape[1])
        enlarged = F.interpolate(x, self.pictures.size[::-1], mode="bicubic")
        enlarged = crop(enlarged, corners * self.block, made.shape[-1])
        off = F.avg_pool2d(made - enlarged, 2 * self.block).abs().mean((1, 2, 3))
        loss: Tensor = (left * (made - real).abs().mean((1, 2, 3)) + (1 - left) * off).mean()
        return loss

    @torch.inference_mode()
    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        """Return `figures_of` whole held-out pictures, and write some beside their originals."""
        upsampler = cast(Adversaries, network).upsampler
        device = next(upsampler.parameters()).device
        originals = [self.pictures.read(i) for i in self.held_out.tolist()]
        squeezed = to_float(torch.stack([self._squeeze(one, SQUEEZES[k % 2]) for k, one in enumerate(originals)]))
        with fast(device):
            made = torch.cat([upsampler(one[None]).cpu() for one in squeezed.to(device)])
        target = to_float(torch.stack([as_tensor(one) for one in originals]))
        show_beside(made, target, self.folder, run)
        return figures_of(made, target, float((made - target).abs().mean()), self.config.adversarial)

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        """Write the denoiser and its upsampler as one checkpoint, in bf16."""
        weights = weights_of(self.base) | upsampler_weights(cast(Adversaries, network).upsampler.state_dict())
        return publish(
            storage, name, {key: value.detach().to("cpu", torch.bfloat16) for key, value in weights.items()},
            kind="denoiser", vocabulary=self.base.info.vocabulary,
            config=config_of(self.base) | upsampler_config(self.network), training=training,
        )  # fmt: skip


def figures_of(made: Tensor, target: Tensor, l1: float, adversarial: float) -> dict[str, float]:
    """Return how far drawn pictures (N, C, H, W) are from held-out ones, and by which figure the best are chosen.

    `l1`, the mean error of pixels, chooses where it is what is learnt. Under an adversarial loss it rises while
    pictures become sharper; there the distance of distributions of detail chooses (`sliced.py`).
    """
    swd = sliced_distance(made, target)
    return {"held_out_loss": swd if adversarial else l1, "held_out_l1": l1, "held_out_swd": swd}


def show_beside(made: Tensor, target: Tensor, folder: Path, run: Run) -> None:
    """Write a grid of some of the drawn pictures beside the held-out ones, evenly chosen."""
    some = torch.linspace(0, len(made) - 1, min(len(made), SHOWN)).long()
    log_samples(folder, grid(torch.stack([made[some], target[some]], 1).flatten(0, 1), columns=2), run.step)


def source_of(dataset: Dataset, pictures: Pictures, base: Denoiser, unseen: Dataset | None) -> dict[str, Any]:
    """Return what a run learns from, which must be the same when it is resumed."""
    source = {"data set": dataset.digest, "base": base.info.digest, "size": list(pictures.size)}
    return {**source, "held out": unseen and unseen.digest}  # by which the best weights are chosen


def with_unseen(dataset: Dataset, unseen: Dataset | None, base: Denoiser) -> Dataset:
    """Return the data set with the labels of `base`, and `unseen` at its end. TrainerError if either cannot be used."""
    parts = {"pictures": dataset} if unseen is None else {"pictures": dataset, "held-out pictures": unseen}
    for which, part in parts.items():
        check_labelled(part, which)
    return merge([in_vocabulary(part, base.vocabulary, base.info.name) for part in parts.values()])


def split(labels: Tensor, paths: Sequence[Path], unseen: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the pictures that are measured, and of those that are trained on. labels: (N, K).

    Not trained on are the last `unseen` or, for 0, one scene in HELD_OUT_EVERY. At most MEASURED of them are measured,
    evenly spread over all. Pictures without labels are left out, since the denoiser samples nothing for them.
    """
    known = labels.any(1).nonzero()[:, 0]
    if unseen:
        apart = known >= len(paths) - unseen
    else:
        apart = scenes_of([paths[i] for i in known.tolist()]) % HELD_OUT_EVERY == 0
    held_out, trained = known[apart], known[~apart]
    measured = held_out[torch.linspace(0, len(held_out) - 1, min(len(held_out), MEASURED)).long()]
    return measured, trained if len(trained) else known


def scenes_of(paths: Sequence[Path]) -> Tensor:
    """Return the number of each picture's scene, from 0 in order of appearance: (N,).

    Pictures of one scene have one name up to the last `_`, as in i-CLEVR. Where that makes one scene of all, each
    picture is one.
    """
    names = [path.with_name(path.stem.rpartition("_")[0] or path.name) for path in paths]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names]) if len(numbers) > 1 else torch.arange(len(paths))


def balance(one: Tensor, other: Tensor, at: Tensor) -> Tensor:
    """Return the weight of loss `other` whose gradient has the size of that of `one` (Esser et al. 2021, eq. 7).

    `at`: the pictures of this process. Their gradients are those of all processes' pictures together.
    """
    sizes = torch.stack([torch.autograd.grad(loss, at, retain_graph=True)[0].norm() for loss in (one, other)])
    if dist.is_initialized():
        squares = sizes.square()
        dist.all_reduce(squares)
        sizes = squares.sqrt()
    weight: Tensor = sizes[0] / sizes[1].clamp(min=1e-12)
    return weight


def make_upsampler(base: Denoiser, size: tuple[int, int], config: UpsampleConfig) -> Adversaries:
    """Return a new upsampler of `base`'s pictures to `size` (width, height), with its discriminator.

    Raises TrainerError if the denoiser's pictures are not squeezed ones, pydantic.ValidationError for a bad size.
    """
    if base.aspect != 1:
        raise TrainerError(f"{base.info.name} learnt padded pictures; an upsampler needs squeezed ones (fit=squeeze)")
    torch.manual_seed(config.seed)
    return Adversaries(UpsamplerNet(UpsamplerConfig.model_validate({**config.network, "picture": size})))


def starting_weights(storage: Location, name: str, config: UpsamplerConfig) -> dict[str, Tensor]:
    """Return the state dict of a published upsampler with a new discriminator, to start a run from.

    TrainerError if the checkpoint has none, or one of another shape.
    """
    found = load_denoiser(resolve(storage, name, "denoiser")).upsampler
    if found is None:
        raise TrainerError(f"{name} has no upsampler")
    if found.config.model_copy(update={"picture": config.picture}) != config:
        raise TrainerError(f"{name} has an upsampler of another shape, {found.config.model_dump_json()}")
    started = Adversaries(UpsamplerNet(config))
    started.upsampler.load_state_dict(found.state_dict())
    return started.state_dict()
