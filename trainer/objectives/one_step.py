"""Trains a model of one network row a picture: a denoiser and an upsampler that sees its last features, together.

Both start from a denoiser that samples in one step. If it takes rotations, the upsampler draws each object in a window
of its own (`shared/diffusion/windows.py`). Labels, places and rotations fix what a picture shows, except for its
light. So a picture of fresh noise is compared with the given one of the same conditions in detail alone, which teaches
it straight edges. Away from edges its light is compared with what the denoiser made of the same noise at the start:
variety stays.
Three discriminators make it sharp. They see the same squares at full size, and shrunk by 2 and by 4, so that one sees
edges and one whole objects. Grain below one level of 256, which no discriminator sees, has losses of its own.
Pictures are drawn in float32, since bfloat16 shifts colours by a share of a level that discriminators see.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, cast

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checkpoint import publish
from shared.device import exact
from shared.diffusion.model import Denoiser
from shared.diffusion.upsampler import (
    OneCall,
    UpsamplerConfig,
    UpsamplerNet,
    crop,
    draws_objects,
    without_light,
    without_margin,
)
from shared.options import Count, Natural, NoOtherFields, SamplingOptions
from shared.pictures import resized
from shared.storage import Location
from trainer.config import Positive, RunConfig, Share
from trainer.data import Dataset, layouts_of, read_all, to_float
from trainer.data_folder import Pictures
from trainer.errors import TrainerError
from trainer.objectives.adversary import Compared, Discriminator, compare, detail_of
from trainer.objectives.upsampler import (
    Weight,
    balance,
    crop_places,
    figures_of,
    show_beside,
    source_of,
    split,
    with_unseen,
)
from trainer.objectives.whole import config_of, upsampler_config, upsampler_weights, weights_of
from trainer.runs import Run
from trainer.train import share_of

SAMPLING: Final = SamplingOptions(sampler="ddim", steps=1, guidance=1.0)
DETAIL, SMALL_DETAIL = 17, 5  # pixels a side whose mean is no detail, in finished and in small pictures
LIGHT, SMALL_LIGHT = 16, 4  # pixels a side of the squares whose means are compared with the start's
ASIDE = 20  # pixels by which a square's middle is at most beside its object's
EDGE = 0.02  # more detail than that in the mean of a square is an edge
EVEN, FLAT = 1.5 / 127.5, 0.9 / 127.5  # less detail than that is an even region; than that, nothing but rounding


class Scale(NamedTuple):
    """What one discriminator sees of the squares."""

    name: str  # of its loss: see `Weights`
    shrunk_by: int
    detail: tuple[tuple[int, float], ...]  # see `Discriminator`
    levels: float  # of 256: deviation of the noise that hides finer grain


SCALES: Final = (
    Scale("adversarial_full", 1, ((3, 15.0), (9, 5.0), (27, 2.5)), 0.75),
    Scale("adversarial_half", 2, ((3, 12.0), (9, 5.0), (27, 2.5)), 0.6),
    Scale("adversarial_quarter", 4, ((3, 10.0), (9, 4.0), (0, 1.0)), 0.5),
)


class Weights(NoOtherFields):
    """The weights of the losses of `OneStep.losses`, by their names. Each discriminator's own loss has 1."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    detail: Weight = 1.0  # of finished pictures, beside the renders
    light: Weight = 3.0  # of finished pictures, beside the base's
    small_detail: Weight = 1.0  # of what the denoiser draws
    small_light: Weight = 1.0
    grid: Weight = 40.0  # grain in even regions: patterns of blocks,
    tint: Weight = 10.0  # tints,
    flat: Weight = 10.0  # and detail where a render has none
    drawn: Weight = 1.0  # of what is drawn in windows, by itself
    # Shares of `adversarial`: at full size it may be largest; of whole objects, 1 was fooled within 50 steps
    adversarial_full: Weight = 1.0
    adversarial_half: Weight = 1 / 6
    adversarial_quarter: Weight = 1 / 8


class OneStepConfig(RunConfig):
    """One run. `network` holds those fields of UpsamplerConfig that do not follow from the data."""

    network: dict[str, Any] = Field(default_factory=lambda: {"channels": 64, "dilations": (1, 2), "hidden": 192})
    batch: Count = 6
    optimizer: Literal["auto", "adamw", "muon"] = "adamw"
    lr: Positive = 7e-4
    denoiser_lr: Share = 0.1  # share of lr at which the denoiser learns, which is trained already; 0: not at all
    upsampler_lr: Share = 1.0  # and the upsampler, but for its windows
    weight_decay: Weight = 0.0
    betas: tuple[Share, Share] = (0.5, 0.99)  # a short memory, since the discriminators change
    warmup_steps: Natural = 100
    clip_norm: Positive | None = None  # one for all networks would be the discriminators'
    crop: Annotated[int, Field(ge=4)] = 16  # side, in blocks, of the squares that are compared
    squares: Count = 4  # of each picture, around its objects
    adversarial: Weight = 11.0  # of the adversarial losses' gradients, relative to those of detail and light
    weights: Weights = Weights()
    windows: bool = True  # draw each object in a window of its own, if the denoiser takes rotations
    windows_alone: bool = False  # these learn without the networks (`windows.py`)


class Squares(NamedTuple):
    """What the networks make of a batch: small pictures, and n squares of finished ones."""

    small: Tensor  # (N, C, h, w)
    made: Tensor  # (n, C, s, s)
    drawn: Tensor | None  # in blocks of pixels, if there are windows: (n, C block^2, s / block, s / block)
    compared: list[Compared]  # with the renders, by each discriminator


class OneStepNetworks(nn.Module):
    """A denoiser with its upsampler, and their discriminators, one of each of `SCALES`.

    Without an adversarial loss there are none: they would learn nothing, for which other processes would wait.
    """

    def __init__(self, drawing: OneCall, config: OneStepConfig) -> None:
        super().__init__()
        self.drawing = drawing
        # the first that begins a parameter's name counts
        self.lr_shares = {"drawing.denoiser.": config.denoiser_lr}
        self.lr_shares |= {"drawing.upsampler.windows.": 1.0}
        self.lr_shares |= {"drawing.upsampler.": config.upsampler_lr}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(share_of(name, self.lr_shares) > 0)
        channels = drawing.upsampler.config.image_channels
        scales = SCALES if config.adversarial else ()
        self.discriminators = nn.ModuleList(Discriminator(channels, detail=scale.detail) for scale in scales)

    def forward(self, *inputs: Any) -> Any:
        """Return what `squares` returns; given labels alone, what the upsampler draws by them."""
        return self.drawing.upsampler.draw(*inputs) if len(inputs) == 1 else self.squares(*inputs)

    def squares(
        self, z: Tensor, t: Tensor, labels: Tensor, corners: Tensor, side: int, real: Tensor, noises: Sequence[Tensor],
    ) -> Squares:  # fmt: skip
        """Draw pictures of these labels, and compare squares of them with `real` ones.

        noises: for each of `SCALES` (2, 2, n, C, s, s), what `compare` takes as `noise` and as `moved`; none if there
        is no adversarial loss. Squares are compared as they are shown, in whole levels of 256.
        """
        upsampler = self.drawing.upsampler
        with exact(z.device):
            trunk = self.drawing.denoiser.trunk(z, t, labels, torch.ones_like(t, dtype=torch.bool))
            _, x0_hat, features = self.drawing.predict(z, *trunk)
            drawn = upsampler.draw(labels)
            made = upsampler.squares(x0_hat, corners, side, features, drawn)
        shown = made + (in_levels(made.detach()) - made.detach())
        compared = [
            compare(
                cast(Discriminator, discriminator),
                shrunk(real, scale.shrunk_by),
                shrunk(shown, scale.shrunk_by),
                *noise,
            )
            for scale, discriminator, noise in zip(SCALES, self.discriminators, noises, strict=False)
        ]
        blocks = None if drawn is None else crop(without_margin(drawn.pixels), corners, side)
        return Squares(x0_hat, made, blocks, compared)


def in_levels(x: Tensor) -> Tensor:
    """Round pictures in [-1, 1] to whole levels of 256, as a PNG does."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def shrunk(x: Tensor, by: int) -> Tensor:
    """Return pictures of the means of `by` x `by` pixels."""
    return F.avg_pool2d(x, by) if by > 1 else x


def losses_of_grain(made: Tensor, real: Tensor, block: int) -> dict[str, Tensor]:
    """Return what is left of grain below a level in even regions, which renders do not have.

    Patterns that repeat every `block` pixels, as an upsampler's blocks make them; tints; and any detail where a render
    has nothing but rounding. made and real: squares (N, C, s, s).
    """
    fine, fine_of_real = detail_of(made, 3), detail_of(real, 3)
    variation = detail_of(real.mean(1, keepdim=True), 9).abs()
    even = (variation - detail_of(variation, 9) < EVEN).float()  # the mean around it

    def in_blocks(x: Tensor) -> Tensor:
        """Sum over all blocks: (N, C, s, s) -> (N, C, block, block)."""
        N, C, side, _ = x.shape
        return x.reshape(N, C, side // block, block, side // block, block).sum((2, 4))

    pixels = in_blocks(even).clamp(min=2 * block * block)
    grid = (in_blocks((fine - fine_of_real) * even) / pixels).abs().mean()
    tint = (detail_of(made - made.mean(1, keepdim=True), 3).abs() * even).mean()
    flat = F.max_pool2d(fine_of_real.abs().amax(1, keepdim=True), 9, 1, 4) < FLAT
    return {"grid": grid, "tint": tint, "flat": (fine.abs() * flat).mean()}


def light_apart(made: Tensor, start: Tensor, square: int, *details: Tensor) -> Tensor:
    """Return how far the means of squares are from the start's, where none of `details` has an edge.

    Elsewhere objects would keep the start's outlines.
    """
    even = torch.ones((), dtype=torch.bool, device=made.device)
    for detail in details:
        even = even & (F.avg_pool2d(detail.abs().amax(1, keepdim=True), square) < EDGE)
    apart: Tensor = F.avg_pool2d(made - start, square).abs() * even
    return apart.mean()


def loss_of_drawn(drawn: Tensor, real: Tensor, channels: int) -> Tensor:
    """Return how far drawn blocks of pixels (N, C block^2, rows, columns) are from real ones, light aside."""
    return (without_light(drawn, channels) - without_light(real, channels)).abs().mean()


def places_of_objects(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw objects of each picture, and return their positions (B, count, 2). labels: (B, K, 5)."""
    objects = torch.multinomial(labels[..., 0], count, replacement=True, generator=generator)
    return labels[torch.arange(len(labels))[:, None], objects, 1:3]


class OneStep:
    """The objective: draw pictures of the data's conditions in one step, from noise of their own.

    `base`: a denoiser that samples in one step, which the networks start from. `folder`: of the run, for sample grids.
    `unseen`: pictures that are measured and not trained on, the last of `pictures`; without them, some scenes of the
    data set.
    """

    name = "one-step"

    def __init__(
        self, dataset: Dataset, pictures: Pictures, base: Denoiser, network: UpsamplerConfig, config: OneStepConfig,
        folder: Path, unseen: Dataset | None = None,
    ) -> None:  # fmt: skip
        self.source = source_of(dataset, pictures, base, unseen)
        dataset = with_unseen(dataset, unseen, base)
        self.dataset, self.pictures, self.base, self.network = dataset, pictures, base, network
        self.config, self.folder, self.labels = config, folder, layouts_of(dataset, base)
        if self.labels.ndim != 3:
            raise TrainerError(f"{base.info.name} takes no positions, so its pictures have no edges to compare")
        self.places = crop_places(pictures, network, config.crop)
        self.held_out, self.trained = split(dataset.labels, pictures.paths, len(unseen) if unseen else 0)
        self.timestep = base.first_step[0]

    def __len__(self) -> int:
        return len(self.trained)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw noise, labels, corners of squares around objects, the renders' squares and small renders, and for each
        discriminator noise on both, and more of it.
        """
        return self.examples(self.trained[index], share, generator)

    def examples(self, chosen: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw what `draw` returns, of the `share` of these pictures."""
        B, (_, rows, columns) = len(chosen), self.base.image_shape
        side, k = self.config.crop * self.network.block, self.config.squares
        z, aside = torch.randn(B, 3, rows, columns, generator=generator), torch.rand(B, k, 2, generator=generator)
        corners = self._corners(self.labels[chosen], aside, generator)
        sides = [side // scale.shrunk_by for scale in SCALES]
        noises = [torch.randn(B, k, 2, 2, 3, side, side, generator=generator)[share] for side in sides]
        chosen, corners = chosen[share], corners[share]
        whole = read_all(self.pictures, chosen)
        small = resized(to_float(whole), (rows, columns))
        squares = crop(whole, corners * self.network.block, side).view(len(chosen), k, -1, side, side)
        return [z[share], self.labels[chosen], corners, squares, small, *noises]

    def _corners(self, labels: Tensor, aside: Tensor, generator: torch.Generator) -> Tensor:
        """Return rows and columns, in blocks, of the first corners of squares around random objects: (B, k, 2)."""
        middles = places_of_objects(labels, aside.shape[1], generator) * torch.tensor(self.pictures.size)
        corners = (middles + ASIDE * (2 * aside - 1)) / self.network.block - self.config.crop / 2
        return corners.flip(-1).round().long().clamp(torch.zeros(2).long(), torch.tensor(self.places))

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the weighted sum of all networks' losses."""
        losses, made = self.losses(network, *inputs)
        weights = self.config.weights.model_dump()
        weighted = {name: weights.get(name, 1.0) * loss for name, loss in losses.items()}
        of_squares = weighted["detail"] + weighted["light"]
        for name in (scale.name for scale in SCALES if scale.name in losses):  # in all processes in one order
            weighted[name] = self.config.adversarial * balance(of_squares, losses[name], made) * weighted[name]
        return torch.stack(list(weighted.values())).sum()

    def losses(self, network: nn.Module, *inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return all losses by their names, without weights, and the squares that the networks make."""
        z, labels, corners, squares, small, *noises = inputs
        z = z.contiguous(memory_format=torch.channels_last)
        t = torch.full((len(z),), self.timestep, device=z.device)
        real, block = to_float(squares.flatten(0, 1)), self.network.block
        pairs = zip(SCALES, noises, strict=True) if self.config.adversarial else ()
        grain = [scale.levels / 127.5 * noise.flatten(0, 1).movedim(0, 2) for scale, noise in pairs]
        made: Squares = network(z, t, labels, corners, self.config.crop, real, grain)
        light = self.light(z, t, labels)
        enlarged = F.interpolate(light, self.pictures.size[::-1], mode="bicubic")
        enlarged = crop(enlarged, corners * block, made.made.shape[-1])
        detail, small_detail = detail_of(real, DETAIL), detail_of(small, SMALL_DETAIL)
        losses = {
            "detail": (detail_of(made.made, DETAIL) - detail).abs().mean(),
            "light": light_apart(made.made, enlarged, LIGHT, detail, detail_of(enlarged, DETAIL)),
            "small_detail": (detail_of(made.small, SMALL_DETAIL) - small_detail).abs().mean(),
            "small_light": light_apart(made.small, light, SMALL_LIGHT, small_detail, detail_of(light, SMALL_DETAIL)),
            **losses_of_grain(made.made, real, block),
        }
        if made.drawn is not None:
            losses["drawn"] = loss_of_drawn(made.drawn, F.pixel_unshuffle(real, block), real.shape[1])
        for scale, compared in zip(SCALES, made.compared, strict=False):
            losses[scale.name] = compared.adversarial
            losses[scale.name.replace("adversarial", "discriminator")] = compared.discriminating
        return losses, made.made

    def light(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the small pictures that the base draws from noise z, whose light is kept.

        In float32, as sampling computes the last layers: bfloat16 shifts blue by a seventh of a level of 256.
        """
        _, p, q = self.base.first_step
        with torch.no_grad(), exact(z.device):
            prediction: Tensor = self.base.network(z, t, labels, torch.ones_like(t, dtype=torch.bool))
            return p * z + q * prediction

    @torch.inference_mode()
    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        """Return `figures_of` held-out renders, beside pictures of their conditions, and each loss by its name.

        Also write some of both. The error of pixels is that of detail.
        """
        networks = cast(OneStepNetworks, network)
        device, generator = next(networks.parameters()).device, torch.Generator().manual_seed(0)
        pictures, losses = list[Tensor](), defaultdict[str, float](float)
        for part in torch.split(self.held_out, self.config.batch):
            inputs = [one.to(device) for one in self.examples(part, slice(None), generator)]
            for name, loss in self.losses(networks, *inputs)[0].items():
                losses[f"held_out/{name}"] += float(loss) * len(part) / len(self.held_out)
            z, labels = inputs[:2]
            t = torch.full((len(z),), self.timestep, device=device)
            pictures.append(networks.drawing(z, t, labels, torch.ones_like(t, dtype=torch.bool))[1].cpu())
        made, target = torch.cat(pictures), to_float(read_all(self.pictures, self.held_out))
        show_beside(made, target, self.folder, run)
        of_detail = float((detail_of(made, DETAIL) - detail_of(target, DETAIL)).abs().mean())
        return {**figures_of(made, target, of_detail, self.config.adversarial), **losses}

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        """Write both networks as one checkpoint, with the base's layout network. All but the denoiser's last layers are
        in bf16; of these it would shift colours by a sixth of a level of 256, which a small network sees.
        """
        drawing, base = cast(OneStepNetworks, network).drawing, self.base
        state = weights_of(base) | drawing.denoiser.state_dict() | upsampler_weights(drawing.upsampler.state_dict())
        config = config_of(base) | upsampler_config(self.network) | {"sampling": SAMPLING.model_dump(mode="json")}
        last = (f"decoder.{len(drawing.denoiser.decoder) - 1}.", "norm.", "head.")
        tensors = {
            key: value.detach().to("cpu", torch.float32 if key.startswith(last) else torch.bfloat16)
            for key, value in state.items()
        }
        return publish(
            storage, name, tensors, kind="denoiser", vocabulary=base.info.vocabulary, config=config, training=training
        )


def check_base(base: Denoiser) -> None:
    """Raise TrainerError if a model of one step cannot start from `base`."""
    if (base.options.steps, base.options.guidance) != (1, 1.0):
        raise TrainerError(f"{base.info.name} samples in {base.options.steps} steps; distil it first (train distilled)")
    if base.aspect != 1:
        raise TrainerError(f"{base.info.name} learnt padded pictures; an upsampler needs squeezed ones (fit=squeeze)")


def make_networks(base: Denoiser, start: Denoiser, size: tuple[int, int], config: OneStepConfig) -> OneStepNetworks:
    """Return the networks with the denoiser of `start`, and its upsampler if it has one that fits, else a new one.

    `size`: width and height of finished pictures. Raises TrainerError as `check_base`, and if `start` is of another
    shape than `base`; pydantic.ValidationError for a bad size.
    """
    check_base(base)
    if start.network.config != base.network.config:
        raise TrainerError(f"{start.info.name} is another network than {base.info.name}")
    torch.manual_seed(config.seed)
    seen: dict[str, Any] = {"features": base.network.config.channels[0]}
    # a start without windows goes on without
    if (
        config.windows
        and draws_objects(base.network.config)
        and (start.upsampler is None or start.upsampler.config.windows)
    ):
        seen["windows"] = {"labels": len(base.vocabulary)}
    own = UpsamplerConfig.model_validate({**config.network, "picture": size, **seen})
    upsampler = UpsamplerNet(own)
    if start.upsampler is not None:
        if start.upsampler.config != own:
            raise TrainerError(f"{start.info.name} has an upsampler of another shape")
        upsampler.load_state_dict(start.upsampler.state_dict())
    denoiser = type(start.network)(start.network.config)
    denoiser.load_state_dict(start.network.state_dict())
    networks = OneStepNetworks(OneCall(denoiser, upsampler, *base.first_step[1:]), config)
    if config.windows_alone:
        if upsampler.windows is None:
            raise TrainerError(
                f"{start.info.name} draws no objects in windows: it takes no rotations, or windows=false"
            )
        networks.requires_grad_(False)
        upsampler.windows.requires_grad_(True)
    return networks
