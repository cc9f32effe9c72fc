"""Measures whether a denoiser memorises its training pictures, by comparing its pictures with unseen ones.

Three measures: the distance to the nearest training picture, the diversity within a label set, and the Frechet
distance. None of them says whether the labels are right. Pixel distance is the root mean square of values in [-1, 1],
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
from trainer.data import labelled, to_float
from trainer.errors import TrainerError
from trainer.studies.study import Report, Subject

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
        _row(
            f"nearest training picture, {kind} distance, {name}", float(generated.distance.quantile(share)),
            float(unseen.distance.quantile(share)), "unseen",
        )
        for name, share in QUANTILES.items()
    ]  # fmt: skip
    nearer = float((generated.distance < unseen.distance.quantile(0.01)).float().mean())
    return [*rows, _row(f"share nearer than 99 % of unseen, {kind}", nearer, 0.01, "by definition")]


def _row(measure: str, generated: float, other: float, of: str) -> Row:
    return {"measure": measure, "generated": generated, "other": other, "of": of}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance of Gaussians fitted to (N, D) and (M, D) (Heusel et al. 2017, eq. 6).

    With X and Y the centred features over root N - 1 and M - 1, the covariances are X'X and Y'Y, and the trace of the
    root of their product is the sum of the singular values of XY'. Fewer pictures give a larger distance, so compare
    only figures of equally many.
    """
    x, y = (features.double() - features.double().mean(0) for features in (a, b))
    x, y = x / (len(x) - 1) ** 0.5, y / (len(y) - 1) ** 0.5
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return float(shift + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum())


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


def run(subject: Subject) -> Report:
    """Generate pictures for the label lists of unseen ones, and compare both with the training set.

    Frechet distances are to another half of the unseen pictures, since different labels alone make a distance. The
    report shows the generated pictures nearest to a training picture, each with its nearest by pixels and by features.
    """
    denoiser, evaluator, seed = subject.denoiser, subject.judge, subject.seed
    training, unseen = subject.read(subject.trained_on), labelled(subject.dataset)
    pictures = min(subject.count or 500, len(unseen) // 2)
    if pictures < 2:
        raise TrainerError(f"at least 4 unseen pictures with labels are needed, there are {len(unseen)}")

    def generate(labels: Tensor, seed: int) -> Tensor:  # clamped as in a PNG, and of the data set's size
        pictures = subject.sample(labels, [picture_seed(seed, i) for i in range(len(labels))]).clamp(-1, 1)
        return resized(pictures, (int(training.images.shape[-2]), int(training.images.shape[-1])))

    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(seed))
    chosen, others = order[: 2 * pictures].view(2, -1)
    compared = {"generated": generate(unseen.labels[chosen], seed), "unseen": to_float(unseen.images[chosen])}
    features = [evaluator.features(images) for images in compared.values()]
    chunks = torch.split(training.images, CHUNK)
    training_features = [evaluator.features(to_float(chunk)) for chunk in chunks]
    by_pixel = [
        nearest(flat_pixels(images), (flat_pixels(to_float(chunk)) for chunk in chunks)) for images in compared.values()
    ]
    by_feature = [nearest(one, training_features) for one in features]
    rows = [*closeness("pixel", *by_pixel), *closeness("feature", *by_feature)]

    if groups := common_label_sets(training.labels, LABEL_SETS, seed):
        index = torch.cat(groups)
        alike = generate(training.labels[index], seed + 1), to_float(training.images[index])
        for kind, describe in (("pixel", flat_pixels), ("feature", evaluator.features)):
            ours, theirs = (mean_pairwise(describe(one).view(len(groups), PER_SET, -1)) for one in alike)
            measure = f"distance within a label set, {kind} ({len(groups)} sets of {PER_SET})"
            rows.append(_row(measure, ours, theirs, "training"))
    other_features = evaluator.features(to_float(unseen.images[others]))
    ours, theirs = (frechet_distance(one, other_features) for one in features)
    rows.append(_row("Frechet distance to other unseen pictures", ours, theirs, "unseen"))

    shown = by_pixel[0].distance.argsort()[:8]
    neighbours = [to_float(training.images[near[0].index[shown]]) for near in (by_pixel, by_feature)]
    nearest_ones = torch.stack([compared["generated"][shown], *neighbours], 1).flatten(0, 1)
    png = png_bytes(grid(nearest_ones, columns=3))
    return Report(f"{pictures} pictures of {denoiser.info.name}", rows, png=png)
