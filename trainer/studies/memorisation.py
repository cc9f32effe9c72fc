"""Measures whether a denoiser memorises its training pictures, by comparing its pictures with unseen ones.

A part of the study of coverage. Two measures: the distance to the nearest training picture, and the diversity within a
label set. Pixel distance is the root mean square of values in [-1, 1],
feature distance Euclidean, of 512 features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.options import picture_seed
from shared.pictures import grid, png_bytes, resized
from trainer.data import to_float
from trainer.joined import chunks
from trainer.studies.study import Subject

CHUNK = 1024  # training pictures compared at once
QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5}
LABEL_SETS, PER_SET = 32, 8  # whose pictures are compared with each other, and pictures of each
Row = dict[str, Any]


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of each of N pictures."""

    distance: Tensor  # (N,)
    index: Tensor  # (N,) int64, into the training set


def flat_pixels(images: Tensor) -> Tensor:
    """Flatten (N, C, H, W), scaled so that a Euclidean distance is a root mean square difference."""
    flat = images.flatten(1)
    return flat / math.sqrt(flat.shape[1])


def nearest(queries: Tensor, chunks: Iterable[Tensor]) -> Nearest:
    """Find the nearest row for each of (N, D) `queries` among the rows of all chunks."""
    best, index, start = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.int64), 0
    for chunk in chunks:
        distance, where = torch.cdist(queries, chunk).min(1)
        index = torch.where(distance < best, where + start, index)
        best = torch.minimum(best, distance)
        start += len(chunk)
    return Nearest(best, index)


def closeness(kind: str, generated: Nearest, unseen: Nearest) -> list[Row]:
    """Return quantiles of the distances to the nearest training picture, and which share is nearer than unseen ones.

    `kind` of distance: pixel or feature. A share of 0.01 is no memorisation.
    """
    rows = [
        row(
            f"nearest training picture, {kind} distance, {name}", float(generated.distance.quantile(share)),
            float(unseen.distance.quantile(share)), "unseen",
        )
        for name, share in QUANTILES.items()
    ]  # fmt: skip
    nearer = float((generated.distance < unseen.distance.quantile(0.01)).float().mean())
    return [*rows, row(f"share nearer than 99 % of unseen, {kind}", nearer, 0.01, "by definition")]


def row(measure: str, generated: float, other: float, of: str) -> Row:
    """One figure of generated pictures, beside that of others."""
    return {"measure": measure, "generated": generated, "other": other, "of": of}


def mean_pairwise(groups: Tensor) -> float:
    """Return the mean Euclidean distance of two rows in a group, over all groups (G, M, D)."""
    return float(torch.stack([torch.pdist(group).mean() for group in groups]).mean())


def common_label_sets(labels: Tensor, count: int, seed: int) -> list[Tensor]:
    """Return PER_SET row indices of (N, K) for each of up to `count` label sets that at least PER_SET rows share."""
    sets, inverse, sizes = labels.unique(dim=0, return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    common = ((sizes >= PER_SET) & sets.any(1)).nonzero().flatten()  # not the pictures whose labels are unknown
    common = common[torch.randperm(len(common), generator=generator)][:count]
    groups = [(inverse == which).nonzero().flatten() for which in common]
    return [group[torch.randperm(len(group), generator=generator)][:PER_SET] for group in groups]


def closeness_to_training(subject: Subject, generated: Tensor, unseen: Tensor) -> tuple[list[Row], bytes]:
    """Compare generated pictures and unseen ones of the same label lists, (N, C, H, W) each, with the training set.

    The picture shows the generated ones nearest to a training picture, each with its nearest by pixels and by features.
    """
    training, evaluator = subject.read(subject.trained_on), subject.judge
    size = int(training.images.shape[-2]), int(training.images.shape[-1])
    compared = [resized(generated.clamp(-1, 1), size), unseen]  # clamped as in a PNG, and of the data set's size
    training_features = [evaluator.features(to_float(chunk)) for chunk in chunks(training.images, CHUNK)]
    by_pixel = [
        nearest(flat_pixels(images), (flat_pixels(to_float(chunk)) for chunk in chunks(training.images, CHUNK)))
        for images in compared
    ]
    by_feature = [nearest(evaluator.features(images), training_features) for images in compared]
    rows = [*closeness("pixel", *by_pixel), *closeness("feature", *by_feature)]

    if groups := common_label_sets(training.labels, LABEL_SETS, subject.seed):
        index = torch.cat(groups)
        drawn = subject.sample(training.labels[index], [picture_seed(subject.seed + 1, i) for i in range(len(index))])
        alike = resized(drawn.clamp(-1, 1), size), to_float(training.images[index])
        for kind, describe in (("pixel", flat_pixels), ("feature", evaluator.features)):
            ours, theirs = (mean_pairwise(describe(one).view(len(groups), PER_SET, -1)) for one in alike)
            measure = f"distance within a label set, {kind} ({len(groups)} sets of {PER_SET})"
            rows.append(row(measure, ours, theirs, "training"))

    shown = by_pixel[0].distance.argsort()[:8]
    neighbours = [to_float(training.images[near[0].index[shown]]) for near in (by_pixel, by_feature)]
    return rows, png_bytes(grid(torch.stack([compared[0][shown], *neighbours], 1).flatten(0, 1), columns=3))
