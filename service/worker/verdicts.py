"""Judges pictures: which labels the evaluator finds in each, and how far objects are from the places asked for.

Knows neither Redis nor sampling.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.records import Picture, Verdict
from shared.evaluator import Judge, score_pictures
from shared.options import THRESHOLD

Distances = tuple[float | None, ...]


def judge_pictures(judge: Judge, pictures: Sequence[Picture], images: Tensor) -> list[Verdict]:
    """Return the verdicts on finished images (N, 3, H, W) of as many pictures."""
    names = judge.vocabulary.names
    probabilities = judge.probabilities(images)  # (N, K)
    targets = torch.tensor([judge.vocabulary.multi_hot(picture.labels) for picture in pictures])
    scores = score_pictures(probabilities, targets)
    distances = _distances(judge, pictures, images, probabilities)
    return [
        Verdict(
            index=picture.index,
            labels=picture.labels,
            seed=picture.seed,
            accuracy=score.accuracy,
            f1=score.f1,
            exact=score.exact,
            probabilities=dict(zip(names, row.tolist(), strict=True)),
            distances=distances.get(i),
        )
        for i, (picture, row, score) in enumerate(zip(pictures, probabilities, scores, strict=True))
    ]


def _distances(
    judge: Judge, pictures: Sequence[Picture], images: Tensor, probabilities: Tensor
) -> dict[int, Distances]:
    """Return the distances of the pictures that have a layout, by their position among `pictures`.

    Empty if the evaluator finds no positions.
    """
    placed = [i for i, picture in enumerate(pictures) if picture.layout is not None]
    positions = judge.positions(images[placed]) if placed else None  # (n, K, 2)
    if positions is None:
        return {}
    height, width = images.shape[-2:]
    found = probabilities[placed] > THRESHOLD
    return {
        i: _distances_of(judge, pictures[i], at, there, height / width)
        for i, at, there in zip(placed, positions, found, strict=True)
    }


def _distances_of(judge: Judge, picture: Picture, positions: Tensor, there: Tensor, aspect: float) -> Distances:
    """Return how far each label's object is from its place, in widths of the picture; None if it is not found.

    positions (K, 2): fractions of width and height. there (K,): whether the object is found. aspect: height over width.
    """
    assert picture.layout is not None
    away: list[float | None] = []
    for index, point in zip(judge.vocabulary.encode(picture.labels), picture.layout, strict=True):
        x, y = positions[index].tolist()
        away.append(math.hypot(x - point.x, (y - point.y) * aspect) if there[index] else None)
    return tuple(away)
