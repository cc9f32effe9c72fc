"""Measures whether a denoiser memorises its training pictures, by comparing its pictures with unseen ones.

Three measures: the distance to the nearest training picture, the diversity within a label set, and the Frechet
distance. None of them says whether the labels are right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from shared.pictures import grid, png_bytes, resized
from trainer.data import labelled, to_float
from trainer.errors import TrainerError
from trainer.studies.study import Report, Subject

CHUNK = 1024  # training pictures compared at once
QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5}
PER_SET = 8  # pictures of one label set


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of each of N pictures."""

    distance: Tensor  # (N,)
    index: Tensor  # (N,) int64, into the training set


@dataclass(frozen=True)
class Closeness:
    """Distances to the nearest training picture, for generated pictures and for as many unseen ones."""

    generated: dict[str, float]  # min, p05, median
    unseen: dict[str, float]
    nearer_than_unseen: float  # share of generated ones nearer than 99 % of unseen ones; 0.01 is no memorisation


@dataclass(frozen=True)
class Found:
    """All figures. Pixel distance: root mean square of values in [-1, 1]. Feature distance: Euclidean, 512 features."""

    pictures: int
    pixel: Closeness
    feature: Closeness
    label_sets: int  # over which `diversity` is the mean
    diversity: dict[str, dict[str, float]]  # generated, training -> pixel, feature: mean distance within a label set
    frechet: dict[str, float]  # generated, unseen -> Frechet distance to other unseen pictures


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


def closeness(generated: Nearest, unseen: Nearest) -> Closeness:
    def figures(distance: Tensor) -> dict[str, float]:
        return {name: float(distance.quantile(share)) for name, share in QUANTILES.items()}

    threshold = unseen.distance.quantile(0.01)
    share = float((generated.distance < threshold).float().mean())
    return Closeness(figures(generated.distance), figures(unseen.distance), share)


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
        pictures = subject.sample(labels, seed).clamp(-1, 1)
        return resized(pictures, (int(training.images.shape[-2]), int(training.images.shape[-1])))

    chosen, others = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(seed))[: 2 * pictures].view(
        2, -1
    )
    compared = {"generated": generate(unseen.labels[chosen], seed), "unseen": to_float(unseen.images[chosen])}
    features = {name: evaluator.features(images) for name, images in compared.items()}
    chunks = torch.split(training.images, CHUNK)
    training_features = [evaluator.features(to_float(chunk)) for chunk in chunks]
    by_pixel = [
        nearest(flat_pixels(images), (flat_pixels(to_float(chunk)) for chunk in chunks)) for images in compared.values()
    ]
    by_feature = [nearest(rows, training_features) for rows in features.values()]

    diversity = {}
    if groups := common_label_sets(training.labels, subject.label_sets, seed):
        index = torch.cat(groups)
        alike = {"generated": generate(training.labels[index], seed + 1), "training": to_float(training.images[index])}
        diversity = {
            name: {
                "pixel": mean_pairwise(flat_pixels(images).view(len(groups), PER_SET, -1)),
                "feature": mean_pairwise(evaluator.features(images).view(len(groups), PER_SET, -1)),
            }
            for name, images in alike.items()
        }
    other_features = evaluator.features(to_float(unseen.images[others]))
    frechet = {name: frechet_distance(rows, other_features) for name, rows in features.items()}
    found = Found(pictures, closeness(*by_pixel), closeness(*by_feature), len(groups), diversity, frechet)
    shown = by_pixel[0].distance.argsort()[:8]
    neighbours = [to_float(training.images[near[0].index[shown]]) for near in (by_pixel, by_feature)]
    nearest_ones = torch.stack([compared["generated"][shown], *neighbours], 1).flatten(0, 1)
    head = ["", "generated", "to compare with"]
    png = png_bytes(grid(nearest_ones, columns=3))
    return Report(f"{pictures} pictures of {denoiser.info.name}", head, rows_of(found), asdict(found), png)


def rows_of(report: Found) -> list[list[str]]:
    """Return the figures as table rows: measure, generated pictures, real pictures to compare with."""
    rows = []
    for name, found in (("pixel", report.pixel), ("feature", report.feature)):
        for key, value in found.generated.items():
            label = f"nearest training picture, {name} distance, {key}"
            rows.append([label, f"{value:.4f}", f"{found.unseen[key]:.4f} (unseen)"])
        share = f"{found.nearer_than_unseen:.4f}"
        rows.append([f"share nearer than 99 % of unseen, {name}", share, "0.01 (by definition)"])
    if report.diversity:
        for key, value in report.diversity["generated"].items():
            label = f"distance within a label set, {key} ({report.label_sets} sets of {PER_SET})"
            rows.append([label, f"{value:.4f}", f"{report.diversity['training'][key]:.4f} (training)"])
    generated, unseen = report.frechet["generated"], report.frechet["unseen"]
    rows.append(["Frechet distance to other unseen pictures", f"{generated:.3f}", f"{unseen:.3f} (unseen)"])
    return rows
