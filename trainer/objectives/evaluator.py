"""Trains the evaluator: a ResNet-18 on labelled pictures, distorted so that they resemble sampled ones.

Knows no denoiser and no sampled picture, so its scores stay independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as change

from shared.checkpoint import publish
from shared.evaluator import IMAGE_SIZE, Evaluator, load_evaluator, score_set
from shared.registry import resolve
from shared.storage import Location
from trainer.config import RunConfig
from trainer.data import Dataset, check_labelled, in_vocabulary, labelled, to_float
from trainer.errors import TrainerError
from trainer.joined import chunks
from trainer.runs import Run

RUN: Final = RunConfig(
    lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.999), warmup_steps=100, cooldown=0.7, clip_norm=None
)  # fmt: skip
# starts from trained weights, which larger steps would first undo
STARTED_RUN: Final = RUN.model_copy(update={"lr": 7e-4})

# Distortions of pictures in [0, 1] that change no label, since sampled pictures are softer, noisier and less exact in
# shape than renders. All pictures get small changes of place, size, light and colour; some are warped; half are blurred
# or coarse; some are noisy. More on one picture would make cubes round, and the network would learn wrong shapes.
# An object's position moves with its picture. A warp moves it by half a pixel, in no direction on average: that is
# ignored.
BORDER = 8  # pixels around a picture, so that no empty corner moves into it
TURN, SHEAR, SHIFT, SCALE = 4.0, 4.0, 0.05, (0.88, 1.12)  # at most: degrees, and shares of the bordered side
WARPED, WARP, WARP_SMOOTH = 0.25, 40.0, 6.0  # share of the groups; size of the noise, and deviation of its blur
JITTER, HUE = 0.2, 0.015  # most change of brightness, contrast and saturation, and of hue
SOFT = [0.5, 0.25, 0.25]  # shares of groups that stay sharp, are blurred, and are coarse
BLUR, COARSE = (0.3, 1.4), (22, 57)  # the blur's deviation; pixels a side, from which the picture is enlarged again
NOISE, NOISY = [0.0, 0.03, 0.08, 0.15], [0.6, 0.2, 0.15, 0.05]  # standard deviations, and the groups' shares
TINT = 0.06  # standard deviation of each colour channel's gain
GROUP = 4  # pictures of a batch that share their distortion, since one by one would take longer than the network
HEAT_WEIGHT = 0.1  # of the heatmap's loss; the labels' and the positions' have 1. Without it, positions take far longer


def augment(images: Tensor, positions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distort (B, 3, 64, 64) in [-1, 1] alike, and move positions (B, K, 2) along.

    All randomness is the generator's: torchvision's transforms draw from torch's global one, which other threads use.
    """
    tinted = (images + 1) / 2 * (1 + TINT * torch.randn(len(images), 3, 1, 1, generator=generator))
    pictures, moved = move(F.pad(tinted.clamp(0, 1), [BORDER] * 4, mode="replicate"), positions, generator)
    return distort(pictures, generator) * 2 - 1, moved


def move(bordered: Tensor, positions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn, shear, shift and scale pictures (B, 3, S, S) with their borders, and their positions (B, K, 2)."""
    side = bordered.shape[-1]
    angle, shear = (between(-most, most, generator) for most in (TURN, SHEAR))
    shift = [between(-SHIFT * side, SHIFT * side, generator) for _ in range(2)]
    how = {"angle": angle, "translate": shift, "scale": between(*SCALE, generator), "shear": [shear, 0.0]}
    points, _ = change.affine_keypoints(positions * IMAGE_SIZE + BORDER, canvas_size=(side, side), **how)
    pictures: Tensor = change.affine(bordered, interpolation=InterpolationMode.BILINEAR, **how)
    return pictures, (points - BORDER) / IMAGE_SIZE


def distort(bordered: Tensor, generator: torch.Generator) -> Tensor:
    """Warp some pictures in [0, 1], cut off their borders, and change colours and sharpness: (B, 3, 64, 64)."""
    pictures: Tensor = bordered
    if between(0, 1, generator) < WARPED:
        side = pictures.shape[-1]
        noise, kernel = 2 * torch.rand(1, 2, side, side, generator=generator) - 1, int(8 * WARP_SMOOTH) + 1
        smooth = change.gaussian_blur(noise, [kernel, kernel], [WARP_SMOOTH, WARP_SMOOTH])
        pictures = change.elastic(pictures, (WARP / side * smooth).movedim(1, -1))
    pictures = change.center_crop(pictures, [IMAGE_SIZE, IMAGE_SIZE])
    factors = [between(1 - JITTER, 1 + JITTER, generator) for _ in range(3)] + [between(-HUE, HUE, generator)]
    adjust = (change.adjust_brightness, change.adjust_contrast, change.adjust_saturation, change.adjust_hue)
    for which in torch.randperm(len(adjust), generator=generator).tolist():
        pictures = adjust[which](pictures, factors[which])
    softer = chosen(SOFT, generator)
    if softer == 1:
        pictures = change.gaussian_blur(pictures, [7, 7], [between(*BLUR, generator)] * 2)
    elif softer == 2:
        side = int(torch.randint(COARSE[0], COARSE[1] + 1, (), generator=generator))
        pictures = change.resize(change.resize(pictures, [side, side]), [IMAGE_SIZE, IMAGE_SIZE])
    noise = NOISE[chosen(NOISY, generator)] * torch.randn(pictures.shape, generator=generator)
    noisy: Tensor = (pictures + noise).clamp(0, 1)
    return noisy


def between(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number evenly."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def chosen(shares: Sequence[float], generator: torch.Generator) -> int:
    """Draw one of several choices by their shares."""
    return int(torch.multinomial(torch.tensor(shares), 1, generator=generator))


def position_loss(located: tuple[Tensor, Tensor], positions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean distance |x - x'| + |y - y'|, and the mean -log of the heatmap's share in the right cell.

    `located` is the position head's answer, positions (B, K, 2); weights (B, K): see `shares_of_objects`.
    """
    found, heat = located
    side = math.isqrt(heat.shape[-1])
    column, row = (positions * side).long().clamp(0, side - 1).unbind(-1)
    missed = -heat.gather(-1, (row * side + column)[..., None])[..., 0]
    distance = (found - positions).abs().sum(-1)
    return (distance * weights).sum(1).mean(), (missed * weights).sum(1).mean()


def shares_of_objects(labels: Tensor) -> Tensor:
    """Return the weights (B, K) with which a sum over labels and a mean over pictures is a mean over all objects.

    labels (B, K): of a whole batch, so that the mean over any equal parts of it is that of the batch.
    """
    return labels * (len(labels) / labels.sum().clamp(min=1))


class Recognising:
    """The objective: name the objects of a distorted picture and, with positions in the data set, locate them."""

    name = "evaluator"

    def __init__(self, dataset: Dataset, held_out: Dataset) -> None:
        check_labelled(dataset, "training pictures")
        check_labelled(held_out, "held-out pictures")
        self.dataset = labelled(dataset)
        self.held_out = in_vocabulary(labelled(held_out), dataset.vocabulary, "the data set")
        unknown = torch.zeros(*self.dataset.labels.shape, 2)
        self.source = {"data set": self.dataset.digest, "held out": self.held_out.digest}
        self.positions = unknown if self.dataset.positions is None else self.dataset.positions

    def __len__(self) -> int:
        return len(self.dataset)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw distorted pictures, with their labels, positions and the weights of these.

        Each group of pictures has a seed of its own.
        """
        seeds = torch.randint(2**62, (len(index),), generator=generator).tolist()
        first, groups = share.start // GROUP * GROUP, []
        for start in range(first, share.stop, GROUP):
            chosen = index[start : start + GROUP]
            own = torch.Generator().manual_seed(seeds[start])
            groups.append(augment(to_float(self.dataset.images[chosen]), self.positions[chosen], own))
        inside = slice(share.start - first, share.stop - first)
        pictures, places = (torch.cat(parts)[inside] for parts in zip(*groups, strict=True))
        labels = self.dataset.labels[index]
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        return [pictures, labels[share], places, shares_of_objects(labels)[share]]

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        pictures, labels, places, weights = inputs
        logits, located = network(pictures)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
        if located is not None:
            distance, missed = position_loss(located, places, weights)
            loss = loss + distance + HEAT_WEIGHT * missed
        return loss

    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        figures = measure(cast(Evaluator, network), self.held_out)
        return {key: value for key, value in figures.items() if isinstance(value, float)}

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        """Write bf16 weights under the names of the course's state dict, with figures of the held-out pictures."""
        evaluator = cast(Evaluator, network)
        tensors = {
            key: value.to("cpu", torch.bfloat16 if value.is_floating_point() else value.dtype)
            for key, value in evaluator.tensors().items()
        }
        return publish(
            storage, name, tensors, kind="evaluator", vocabulary=evaluator.vocabulary.names,
            config={"architecture": evaluator.architecture, "image_size": IMAGE_SIZE},
            training={**training, "held_out": measure(evaluator, self.held_out)},
        )  # fmt: skip


def measure(evaluator: Evaluator, held_out: Dataset) -> dict[str, Any]:
    """Judge undistorted pictures: the scores, exact match by number of objects, and how far found positions are off.

    A position's error is a fraction of the picture's side.
    """
    names, labels = evaluator.vocabulary.names, held_out.labels
    probabilities = torch.cat([evaluator.probabilities(to_float(chunk)) for chunk in chunks(held_out.images, 256)])
    score = score_set(probabilities, labels, names)
    figures: dict[str, Any] = {"accuracy": score.accuracy, "exact_match": score.exact_match, "f1": score.f1}
    counts = labels.sum(1).int()
    figures["exact_match_of"] = {
        str(n): score_set(probabilities[counts == n], labels[counts == n], names).exact_match
        for n in sorted(set(counts.tolist()))
    }
    if evaluator.locator and held_out.positions is not None:
        parts = map(to_float, chunks(held_out.images, 256))
        found = torch.cat([cast(Tensor, evaluator.positions(part)) for part in parts])
        errors = (found - held_out.positions).norm(dim=-1)[labels > 0]
        figures |= {"position_error_median": float(errors.median()), "position_error_mean": float(errors.mean())}
    return figures


def make_network(dataset: Dataset, seed: int, architecture: str) -> Evaluator:
    torch.manual_seed(seed)
    locates = dataset.positions is not None
    evaluator = Evaluator(dataset.vocabulary, locates=locates, architecture=architecture)
    evaluator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return evaluator


def start_from(evaluator: Evaluator, storage: Location, name: str) -> None:
    """Give the run's evaluator the weights of a published one.

    A position head that only one of the two has is ignored, or starts from its random weights.
    """
    start = load_evaluator(resolve(storage, name, "evaluator"))
    if start.vocabulary != evaluator.vocabulary:
        raise TrainerError(f"{name} has another vocabulary than the data set; it cannot be started from")
    if start.architecture != evaluator.architecture:
        raise TrainerError(
            f"{name} is a {start.architecture}, not a {evaluator.architecture}; it cannot be started from"
        )
    evaluator.load_state_dict(start.state_dict(), strict=False)
