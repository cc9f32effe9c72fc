"""Measures how well a denoiser puts objects at given places: those of random scenes.

Fresh renders of the same scenes, measured in the same way, are the practical ceiling. Pictures of the same labels at
places that the denoiser chooses show what its layouts cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from iclevr.scenes.render_folder import random_scenes
from iclevr.scenes.scene import picture_position
from iclevr.studies.renders import check_renders, fresh_renders
from shared.diffusion.denoise import finish
from shared.diffusion.layouts import OUTSIDE, PLACE, positions_at
from shared.diffusion.model import Denoiser
from shared.evaluator import Evaluator, score_set
from shared.options import THRESHOLD, SamplingOptions, picture_seed
from shared.pictures import grid, png_bytes
from shared.vocabulary import Vocabulary
from trainer.errors import TrainerError
from trainer.score import Lists, targets_of
from trainer.studies.study import Report, Subject

MOST_OBJECTS = 10  # of a rendered scene
Points = list[tuple[float, float]]  # places of a picture's objects, in the order of its labels


@dataclass(frozen=True)
class Placed:
    """The verdict on pictures of scenes with a number of objects."""

    objects: int
    pictures: str  # whose they are
    accuracy: float
    exact_match: float
    distance: float | None  # mean, in widths, of found objects from their places; None if there are no such objects


def judge_places(
    evaluator: Evaluator, images: Tensor, targets: Tensor, wanted: Tensor, aspect: float
) -> tuple[float, float, float | None]:
    """Return accuracy, exact match and mean distance of images (N, 3, H, W) with objects wanted at (N, K, 2).

    The distance is over the requested objects that have a place and that the evaluator finds. A denoiser draws no
    places for more objects than it has learnt. `aspect`: height over width of a picture.
    """
    probabilities, found_at = evaluator.probabilities(images), evaluator.positions(images)
    score = score_set(probabilities, targets, evaluator.vocabulary.names)
    if found_at is None:
        return score.accuracy, score.exact_match, None
    found = (probabilities > THRESHOLD) & (targets > 0.5) & (wanted[..., 0] != OUTSIDE)
    away = ((found_at - wanted) * torch.tensor([1.0, aspect])).norm(dim=-1)
    return score.accuracy, score.exact_match, float(away[found].mean()) if found.any() else None


def run(subject: Subject) -> Report:
    """Measure scenes of each number of objects, by default of all that the denoiser draws. The last ones are shown."""
    denoiser, count = subject.denoiser, subject.count or 64
    few, many = denoiser.info.support.objects
    placed = list[Placed]()
    for n in subject.objects or range(max(1, few), min(many, MOST_OBJECTS) + 1):
        measured, images = measure(
            denoiser, subject.judge, subject.options, objects=n, count=count, seed=subject.seed,
            advance=subject.advance(f"sampling {n} objects (pictures x steps)", 2 * count * subject.options.steps),
        )  # fmt: skip
        placed += measured
    title = f"{count} scenes with each number of objects, distances in widths"
    return Report(title, [asdict(one) for one in placed], png=png_bytes(grid(images)))


def measure(
    denoiser: Denoiser, evaluator: Evaluator, options: SamplingOptions, *, objects: int, count: int, seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[Placed], Tensor]:  # fmt: skip
    """Sample `count` random scenes with `objects` distinct objects each, at their places and at places of its own.

    Renders them too. Returns the figures of all three, and the pictures sampled at the scenes' places.
    """
    if denoiser.layouts is None or denoiser.aspect != 1.0:
        raise TrainerError(f"{denoiser.info.name} takes no positions in pictures without padding")
    check_renders(denoiser.vocabulary, denoiser.info.name)
    check_renders(evaluator.vocabulary, "the evaluator")
    lists = list(random_scenes(count, objects, seed).values())
    fresh = fresh_renders(lists, np.random.default_rng([seed, 4]), centre=0.0)
    points = [[picture_position(placed) for placed in scene] for scene in fresh.scenes]
    targets, given = targets_of(lists, denoiser.vocabulary), _positions(lists, points, denoiser.vocabulary)
    stepper, name = denoiser.stepper(), denoiser.info.name
    pictures: dict[str, tuple[Tensor, list[Points]]] = {}  # with the places of each picture's objects
    for what, positions in ((name, list(given)), (f"{name}, its own places", [None] * count)):
        seeds = [picture_seed(seed, i) for i in range(count)]
        rows = stepper.new_rows(targets, [options] * count, seeds, positions)
        images = finish(stepper, rows, lambda rows: advance(len(rows)))
        drawn = zip(rows, map(denoiser.vocabulary.encode, lists), strict=True)
        pictures[what] = images, [row.labels[indices, PLACE].tolist() for row, indices in drawn]
    sampled = pictures[name][0]
    pictures["fresh renders"] = fresh.images, points
    aspect, asked = sampled.shape[-2] / sampled.shape[-1], targets_of(lists, evaluator.vocabulary)
    placed = []
    for what, (images, places) in pictures.items():
        wanted = _positions(lists, places, evaluator.vocabulary)
        placed.append(Placed(objects, what, *judge_places(evaluator, images, asked, wanted, aspect)))
    return placed, sampled


def _positions(lists: Lists, points: Sequence[Points], vocabulary: Vocabulary) -> Tensor:
    """Return the positions (N, K, 2) of N scenes' objects, given their labels and `points` in the same order."""
    indices = map(vocabulary.encode, lists)
    return torch.stack([positions_at(*one, len(vocabulary)) for one in zip(indices, points, strict=True)])
