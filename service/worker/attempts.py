"""An attempt at a picture: how it begins, the evaluator's verdict on it, and whether another one follows.

A worker (`engine.py`) and `labelgrid.load` share it, so that a request gives the same pictures and verdicts in both.
Knows no batch, no Redis and no logs.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from service.contract.records import Picture, Verdict
from shared.diffusion.denoise import Row, Stepper
from shared.diffusion.edits import places_of, with_objects
from shared.diffusion.layouts import positions_at
from shared.evaluator import Judge, score_pictures
from shared.options import THRESHOLD
from shared.vocabulary import Vocabulary

Distances = tuple[float | None, ...]
Places = tuple[tuple[float, float], ...]  # of a picture's objects, in the order of its labels


def new_rows(stepper: Stepper, vocabulary: Vocabulary, pictures: Sequence[Picture]) -> list[Row]:
    """Return pictures at their first step, whose layouts are drawn together. `vocabulary`: the denoiser's.

    Raises LabelError for labels that it does not have, and ValueError as `Stepper.new_rows`.
    """
    rows = stepper.new_rows(
        [vocabulary.multi_hot(one.labels) for one in pictures],
        [one.options for one in pictures],
        [one.noise_seed for one in pictures],
        [_positions(one, vocabulary) for one in pictures],
    )
    for one, row in zip(pictures, rows, strict=True):
        if one.options.edits:
            if stepper.layouts is None:
                raise ValueError("only pictures of a model with positions can be edited")
            row.labels = with_objects(row.labels, one.objects, vocabulary)
    return rows


def _positions(picture: Picture, vocabulary: Vocabulary) -> Tensor | None:
    """Return the positions (K, 2) that the request gives."""
    if picture.layout is None:
        return None
    points = [(point.x, point.y) for point in picture.layout]
    return positions_at(vocabulary.encode(picture.labels), points, len(vocabulary))


def places_in(stepper: Stepper, vocabulary: Vocabulary, picture: Picture, row: Row) -> Places | None:
    """Return where the objects of a picture are; None if the model knows no positions."""
    if stepper.layouts is None:
        return None
    return places_of(row.labels, [one.label for one in picture.objects], vocabulary)


def judge_pictures(
    judge: Judge, pictures: Sequence[Picture], images: Tensor, places: Sequence[Places | None] | None = None
) -> list[Verdict]:
    """Return the verdicts on finished images (N, 3, H, W) of as many pictures. `places`: of each one's objects."""
    names = judge.vocabulary.names
    probabilities = judge.probabilities(images)  # (N, K)
    asked = [tuple(one.label for one in picture.objects) for picture in pictures]
    targets = torch.tensor([judge.vocabulary.multi_hot(labels) for labels in asked])
    scores = score_pictures(probabilities, targets)
    known = [None] * len(pictures) if places is None else places
    # The request says where objects are.
    chosen = [at if one.layout or one.options.edits else None for one, at in zip(pictures, known, strict=True)]
    distances = _distances(judge, asked, chosen, images, probabilities)
    return [
        Verdict(
            index=picture.index,
            labels=asked[i],
            seed=picture.noise_seed,
            attempt=picture.attempt,
            accuracy=score.accuracy,
            f1=score.f1,
            exact=score.exact,
            probabilities=dict(zip(names, row.tolist(), strict=True)),
            distances=distances.get(i),
            places=known[i],
        )
        for i, (picture, row, score) in enumerate(zip(pictures, probabilities, scores, strict=True))
    ]


def _distances(
    judge: Judge,
    labels: Sequence[Sequence[str]],
    places: Sequence[Places | None],
    images: Tensor,
    probabilities: Tensor,
) -> dict[int, Distances]:
    """Return how far each label's object is from its place, for the pictures with `places`, by position.

    In widths of the picture; None for an object that is not found. Empty if the evaluator finds no positions.
    """
    placed = [i for i, at in enumerate(places) if at is not None]
    positions = judge.positions(images[placed]) if placed else None  # (n, K, 2): fractions of width and height
    if positions is None:
        return {}
    height, width = images.shape[-2:]
    found = probabilities[placed] > THRESHOLD  # (n, K)
    distances = {}
    for i, at, there in zip(placed, positions, found, strict=True):
        wanted = zip(judge.vocabulary.encode(labels[i]), places[i] or (), strict=True)
        distances[i] = tuple(
            math.hypot(float(at[k, 0]) - x, (float(at[k, 1]) - y) * height / width) if there[k] else None
            for k, (x, y) in wanted
        )
    return distances


def following(picture: Picture, verdict: Verdict) -> Picture | None:
    """Return the attempt after one with this verdict, if the picture is drawn until exact; None if there is none."""
    if verdict.exact or picture.attempt >= picture.last:
        return None
    return replace(picture, attempt=picture.attempt + 1)


def is_better(verdict: Verdict, other: Verdict) -> bool:
    """Whether an attempt is better than another one: of the higher F1, then accuracy."""
    return (verdict.f1, verdict.accuracy) > (other.f1, other.accuracy)


def final_verdict(picture: Picture, best: Verdict, all_attempts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on the attempt that is kept; with those on all attempts, if it was selected from them."""
    if picture.options.until is None or picture.options.kept is not None:
        return best
    return best.model_copy(update={"attempts": tuple(all_attempts)})
