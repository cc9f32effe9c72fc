"""Trains a model of one network row a picture: a denoiser and an upsampler that sees its last features, together.

Both start from a denoiser that samples in one step. If its labels are the renderer's solids and it takes rotations,
the upsampler paints them as the renderer's camera sees them (`shared/diffusion/solids.py`). Labels, places and
rotations fix what a render shows, except for its light. So a picture of fresh noise is compared with the render of the
same conditions in detail alone, which teaches it straight edges. Away from edges its light is compared with what the
denoiser made of the same noise at the start: variety stays.
Three discriminators make it sharp. They see the same squares at full size, and shrunk by 2 and by 4, so that one sees
edges and one whole objects. Grain below one level of 256, which no discriminator sees, has losses of its own.
Pictures are drawn in float32, since bfloat16 shifts colours by a share of a level that discriminators see.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checkpoint import publish
from shared.device import exact
from shared.diffusion.layouts import LAYOUTS
from shared.diffusion.model import UPSAMPLER, Denoiser
from shared.diffusion.solids import SOLIDS
from shared.diffusion.upsampler import (
    OneCall,
    UpsamplerConfig,
    UpsamplerNet,
    crop,
    paints_objects,
    without_light,
    without_margin,
)
from shared.options import Count, Natural, SamplingOptions
from shared.pictures import grid, resized
from shared.storage import Location
from trainer.config import Positive, RunConfig, Share
from trainer.data import Dataset, check_labelled, in_vocabulary, layouts_of, read_all, to_float
from trainer.data_folder import Pictures
from trainer.errors import TrainerError
from trainer.objectives.adversary import Discriminator, compare, detail_of
from trainer.objectives.camera import projection
from trainer.objectives.upsampler import HELD_OUT_EVERY, MEASURED, SHOWN, Weight, balance, crop_places, scenes_of
from trainer.runs import Run, log_samples
from trainer.train import share_of

SAMPLING: Final = SamplingOptions(sampler="ddim", steps=1, guidance=1.0)
DETAIL, SMALL_DETAIL = 17, 5  # pixels a side whose mean is no detail, in finished and in small pictures
LIGHT, SMALL_LIGHT = 16, 4  # pixels a side of the squares whose means are compared with the start's
LIGHT_WEIGHT = 3.0  # of that comparison in finished pictures, beside that of detail
ASIDE = 20  # pixels by which a square's middle is at most beside its object's
EDGE = 0.02  # more detail than that in the mean of a square is an edge
CUBE_WEIGHT = 3.0  # of cubes, which the upsampler paints, beside other objects when squares are chosen
EVEN, FLAT = 1.5 / 127.5, 0.9 / 127.5  # less detail than that is an even region; than that, nothing but rounding
GRID_WEIGHT, TINT_WEIGHT, FLAT_WEIGHT = 40.0, 10.0, 10.0  # of the losses in such regions


class Scale(NamedTuple):
    """What one discriminator sees of the squares."""

    shrunk_by: int
    detail: tuple[tuple[int, float], ...]  # see `Discriminator`
    share: float  # of `adversarial`: at full size it may be largest; of whole objects, 1 was fooled within 50 steps
    levels: float  # of 256: deviation of the noise that hides finer grain


SCALES: Final = (
    Scale(1, ((3, 15.0), (9, 5.0), (27, 2.5)), 1.0, 0.75),
    Scale(2, ((3, 12.0), (9, 5.0), (27, 2.5)), 1 / 6, 0.6),
    Scale(4, ((3, 10.0), (9, 4.0), (0, 1.0)), 1 / 8, 0.5),
)


class OneStepConfig(RunConfig):
    """One run. `network` holds those fields of UpsamplerConfig that do not follow from the data."""

    network: dict[str, Any] = Field(default_factory=lambda: {"channels": 64, "dilations": (1, 2), "hidden": 192})
    batch: Count = 6
    optimizer: Literal["auto", "adamw", "muon"] = "adamw"
    lr: Positive = 7e-4
    denoiser_lr: Share = 0.1  # share of lr at which the denoiser learns, which is trained already; 0: not at all
    upsampler_lr: Share = 1.0  # and the upsampler, but for what it paints
    weight_decay: Weight = 0.0
    betas: tuple[Share, Share] = (0.5, 0.99)  # a short memory, since the discriminators change
    warmup_steps: Natural = 100
    clip_norm: Positive | None = None  # one for all networks would be the discriminators'
    crop: Annotated[int, Field(ge=4)] = 16  # side, in blocks, of the squares that are compared
    squares: Count = 4  # of each picture, around its objects
    adversarial: Weight = 11.0  # of the adversarial losses' gradients, relative to those of the other losses
    painter_alone: bool = False  # it learns without the networks (`painter.py`)


class OneStepNetworks(nn.Module):
    """A denoiser with its upsampler, and their discriminators, one of each of `SCALES`."""

    def __init__(self, drawing: OneCall, config: OneStepConfig) -> None:
        super().__init__()
        self.drawing = drawing
        # the first that begins a parameter's name counts
        self.lr_shares = {"drawing.denoiser.": config.denoiser_lr}
        self.lr_shares |= {"drawing.upsampler.painter.": 1.0, "drawing.upsampler.retouch.": 1.0}
        self.lr_shares |= {"drawing.upsampler.": config.upsampler_lr}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(share_of(name, self.lr_shares) > 0)
        channels = drawing.upsampler.config.image_channels
        self.discriminators = nn.ModuleList(Discriminator(channels, detail=scale.detail) for scale in SCALES)

    def forward(self, *inputs: Any) -> Any:
        """Return what `squares` returns; given labels alone, what the upsampler paints by them."""
        return self.drawing.upsampler.paint(*inputs) if len(inputs) == 1 else self.squares(*inputs)

    def squares(
        self, z: Tensor, t: Tensor, labels: Tensor, corners: Tensor, side: int, real: Tensor, noises: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:  # fmt: skip
        """Return small pictures, squares of finished ones, what is painted in these if there is a painter, and the
        losses of each discriminator and of its adversary.

        noises: for each of `SCALES` (2, 2, n, C, s, s), what `compare` takes as `noise` and as `moved`; none if there
        is no adversarial loss. Squares are compared as they are shown, in whole levels of 256.
        """
        upsampler = self.drawing.upsampler
        with exact(z.device):
            trunk = self.drawing.denoiser.trunk(z, t, labels, torch.ones_like(t, dtype=torch.bool))
            _, x0_hat, features = self.drawing.predict(z, *trunk)
            painted = upsampler.paint(labels)
            made = upsampler(x0_hat, corners, side, features, painted)
        shown = made + (in_levels(made.detach()) - made.detach())
        losses = [
            compare(
                cast(Discriminator, discriminator),
                shrunk(real, scale.shrunk_by),
                shrunk(shown, scale.shrunk_by),
                *noise,
            )
            for scale, discriminator, noise in zip(SCALES, self.discriminators, noises, strict=False)
        ]
        blocks = None if painted is None else crop(without_margin(painted.pixels), corners, side)
        return x0_hat, made, blocks, losses


def in_levels(x: Tensor) -> Tensor:
    """Round pictures in [-1, 1] to whole levels of 256, as a PNG does."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def shrunk(x: Tensor, by: int) -> Tensor:
    """Return pictures of the means of `by` x `by` pixels."""
    return F.avg_pool2d(x, by) if by > 1 else x


def losses_of_grain(made: Tensor, real: Tensor, block: int) -> Tensor:
    """Return what is left of grain below a level in even regions, which renders do not have, with its weights.

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
    return GRID_WEIGHT * grid + TINT_WEIGHT * tint + FLAT_WEIGHT * (fine.abs() * flat).mean()


def light_apart(made: Tensor, start: Tensor, square: int, *details: Tensor) -> Tensor:
    """Return how far the means of squares are from the start's, where none of `details` has an edge.

    Elsewhere objects would keep the start's outlines.
    """
    even = torch.ones((), dtype=torch.bool, device=made.device)
    for detail in details:
        even = even & (F.avg_pool2d(detail.abs().amax(1, keepdim=True), square) < EDGE)
    apart: Tensor = F.avg_pool2d(made - start, square).abs() * even
    return apart.mean()


def loss_of_painted(painted: Tensor, real: Tensor, channels: int) -> Tensor:
    """Return how far painted blocks of pixels (N, C block^2, rows, columns) are from real ones, light aside."""
    return (without_light(painted, channels) - without_light(real, channels)).abs().mean()


def places_of_objects(labels: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw objects of each picture, and return their positions (B, count, 2). labels: (B, K, 5); weights: (K,)."""
    objects = torch.multinomial(labels[..., 0] * weights, count, replacement=True, generator=generator)
    return labels[torch.arange(len(labels))[:, None], objects, 1:3]


class OneStep:
    """The objective: draw pictures of the data's conditions in one step, from noise of their own.

    `base`: a denoiser that samples in one step, which the networks start from. `folder`: of the run, for sample grids.
    """

    name = "one-step"

    def __init__(
        self, dataset: Dataset, pictures: Pictures, base: Denoiser, network: UpsamplerConfig, config: OneStepConfig,
        folder: Path,
    ) -> None:  # fmt: skip
        self.source = {"data set": dataset.digest, "base": base.info.digest, "size": list(pictures.size)}
        dataset = in_vocabulary(dataset, base.vocabulary, base.info.name)
        check_labelled(dataset, "pictures")
        self.dataset, self.pictures, self.base, self.network = dataset, pictures, base, network
        self.config, self.folder, self.labels = config, folder, layouts_of(dataset, base)
        if self.labels.ndim != 3:
            raise TrainerError(f"{base.info.name} takes no positions, so its pictures have no edges to compare")
        self.places = crop_places(pictures, network, config.crop)
        known = dataset.labels.any(1).nonzero()[:, 0]
        scenes = scenes_of([pictures.paths[i] for i in known.tolist()])
        self.held_out, trained = known[scenes % HELD_OUT_EVERY == 0], known[scenes % HELD_OUT_EVERY != 0]
        self.trained = trained if len(trained) else known
        self.timestep = base.first_step[0]
        self.weights = torch.ones(self.labels.shape[1])
        if network.solids:
            self.weights = torch.tensor([CUBE_WEIGHT if solid == "cube" else 1.0 for solid in network.solids])

    def __len__(self) -> int:
        return len(self.trained)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw noise, labels, corners of squares around objects, the renders' squares and small renders, and for each
        discriminator noise on both, and more of it.
        """
        B, (_, rows, columns) = len(index), self.base.image_shape
        chosen, side, k = self.trained[index], self.config.crop * self.network.block, self.config.squares
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
        middles = places_of_objects(labels, self.weights, aside.shape[1], generator) * torch.tensor(self.pictures.size)
        corners = (middles + ASIDE * (2 * aside - 1)) / self.network.block - self.config.crop / 2
        return corners.flip(-1).round().long().clamp(torch.zeros(2).long(), torch.tensor(self.places))

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the sum of all networks' losses."""
        z, labels, corners, squares, small, *noises = inputs
        z = z.contiguous(memory_format=torch.channels_last)
        t = torch.full((len(z),), self.timestep, device=z.device)
        with torch.no_grad():
            start = self.base.network(z, t, labels, torch.ones_like(t, dtype=torch.bool)).float()
        real, weight = to_float(squares.flatten(0, 1)), self.config.adversarial
        pairs = zip(SCALES, noises, strict=True) if weight else ()
        grain = [scale.levels / 127.5 * noise.flatten(0, 1).movedim(0, 2) for scale, noise in pairs]
        x0_hat, made, painted, compared = network(z, t, labels, corners, self.config.crop, real, grain)
        drawing = cast(OneStepNetworks, getattr(network, "module", network)).drawing
        light = drawing.p * z + drawing.q * start
        enlarged = F.interpolate(light, self.pictures.size[::-1], mode="bicubic")
        enlarged = crop(enlarged, corners * self.network.block, made.shape[-1])
        detail, small_detail = detail_of(real, DETAIL), detail_of(small, SMALL_DETAIL)
        of_squares = (detail_of(made, DETAIL) - detail).abs().mean()
        of_squares = of_squares + LIGHT_WEIGHT * light_apart(made, enlarged, LIGHT, detail, detail_of(enlarged, DETAIL))
        of_pictures = (detail_of(x0_hat, SMALL_DETAIL) - small_detail).abs().mean()
        of_pictures = of_pictures + light_apart(
            x0_hat, light, SMALL_LIGHT, small_detail, detail_of(light, SMALL_DETAIL)
        )
        loss: Tensor = of_squares + of_pictures + losses_of_grain(made, real, self.network.block)
        if painted is not None:  # by itself
            loss = loss + loss_of_painted(painted, F.pixel_unshuffle(real, self.network.block), made.shape[1])
        for scale, (adversarial, discriminating) in zip(SCALES, compared, strict=False):
            loss = loss + weight * scale.share * balance(of_squares, adversarial, made) * adversarial + discriminating
        return loss

    @torch.inference_mode()
    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        """Return how much detail of held-out renders differs, and write some beside pictures of their conditions."""
        drawing, chosen = cast(OneStepNetworks, network).drawing, self.held_out[:MEASURED]
        device = next(drawing.parameters()).device
        z = torch.randn(len(chosen), *self.base.image_shape, generator=torch.Generator().manual_seed(0))
        t, labels = torch.full((len(chosen),), self.timestep), self.labels[chosen]
        keep = torch.ones_like(t, dtype=torch.bool)
        parts = zip(*(torch.split(one.to(device), self.config.batch) for one in (z, t, labels, keep)), strict=True)
        made = torch.cat([drawing(*part)[1].cpu() for part in parts])
        target = to_float(read_all(self.pictures, chosen))
        shown = torch.stack([made[:SHOWN], target[:SHOWN]], 1).flatten(0, 1)
        log_samples(self.folder, grid(shown, columns=2), run.step)
        return {"held_out_loss": float((detail_of(made, DETAIL) - detail_of(target, DETAIL)).abs().mean())}

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        """Write both networks as one checkpoint, with the base's layout network. All but the denoiser's last layers are
        in bf16; of these it would shift colours by a sixth of a level of 256, which a small network sees.
        """
        drawing, base = cast(OneStepNetworks, network).drawing, self.base
        state = dict(drawing.denoiser.state_dict())
        state |= {UPSAMPLER + key: value for key, value in drawing.upsampler.state_dict().items()}
        assert base.layouts is not None  # it takes positions
        state |= {LAYOUTS + key: value for key, value in base.layouts.network.state_dict().items()}
        config = {key: value for key, value in base.info.config.items() if key != "base"}
        config |= {"picture": list(self.network.picture), "upsampler": self.network.model_dump(mode="json")}
        config["sampling"] = SAMPLING.model_dump(mode="json")
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
    seen = {"features": base.network.config.channels[0], **what_it_paints(base)}
    if start.upsampler is not None and not start.upsampler.config.solids:  # one without a painter goes on without
        seen = {"features": base.network.config.channels[0]}
    own = UpsamplerConfig.model_validate({**config.network, "picture": size, **seen})
    upsampler = UpsamplerNet(own)
    if start.upsampler is not None:
        if start.upsampler.config != own:
            raise TrainerError(f"{start.info.name} has an upsampler of another shape")
        upsampler.load_state_dict(start.upsampler.state_dict())
    denoiser = type(start.network)(start.network.config)
    denoiser.load_state_dict(start.network.state_dict())
    networks = OneStepNetworks(OneCall(denoiser, upsampler, *base.first_step[1:]), config)
    if config.painter_alone:
        if upsampler.painter is None:
            raise TrainerError(f"{start.info.name} paints no objects: its labels are no solids that have rotations")
        networks.requires_grad_(False)
        upsampler.painter.requires_grad_(True)
    return networks


def what_it_paints(base: Denoiser) -> dict[str, Any]:
    """Return the fields of UpsamplerConfig for a painter, if a denoiser's labels are the renderer's, with rotations."""
    names = [name.rpartition(" ")[2] for name in base.vocabulary.names]
    if not paints_objects(base.network.config) or not set(names) <= set(SOLIDS):
        return {}
    return {"solids": names, "camera": projection()}
