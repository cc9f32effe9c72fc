"""Measures fidelity and coverage: whether generated pictures look like the data's, and whether they cover all of it.

Pictures are compared by an evaluator's features. Scores say neither: a model that draws one good picture for each label
list is always right. None of the figures says whether the labels are right.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from shared.options import picture_seed
from trainer.data import labelled, to_float
from trainer.errors import TrainerError
from trainer.studies.study import Report, Subject

NEIGHBOURS = 5  # k: a picture's neighbourhood reaches to its k-th nearest neighbour, as in Naeem et al. 2020


@dataclass(frozen=True)
class Coverage:
    """Figures of one set of pictures against a reference set, each better the higher. All but density are at most 1."""

    precision: float  # share of the pictures inside some reference picture's neighbourhood (Kynkaanniemi et al. 2019)
    recall: float  # share of the reference pictures inside some picture's neighbourhood
    density: float  # mean number of reference neighbourhoods that hold a picture, over k (Naeem et al. 2020)
    coverage: float  # share of the reference pictures whose neighbourhood holds a picture


def compare(reference: Tensor, pictures: Tensor, k: int = NEIGHBOURS) -> Coverage:
    """Compare the features (M, D) of pictures with those of the reference, (N, D). Both have more than k rows."""

    def radius(rows: Tensor) -> Tensor:  # to the k-th neighbour; the nearest of all is the row itself
        return _distances(rows, rows).kthvalue(k + 1, 1).values

    apart, reach = _distances(reference, pictures), radius(reference)  # (N, M), (N,)
    inside = apart < reach[:, None]
    return Coverage(
        precision=float(inside.any(0).double().mean()),
        recall=float((apart < radius(pictures)).any(1).double().mean()),
        density=float(inside.sum(0).double().mean()) / k,
        coverage=float(inside.any(1).double().mean()),
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances (N, M), exact where they are zero."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def run(subject: Subject) -> Report:
    """Compare generated pictures with as many of the data's, and as many other ones of the data's as well.

    The generated pictures have the label lists of the latter, so that both would score alike if they looked alike.
    """
    dataset, count, seed = labelled(subject.dataset), subject.count or 1000, subject.seed
    if len(dataset) < 2 * count or count <= NEIGHBOURS:
        most = f"at most {len(dataset) // 2} pictures: half of those with labels"
        raise TrainerError(f"--count {count} needs more than {NEIGHBOURS} and {most}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[: 2 * count]
    reference, others = order.view(2, count)
    generated = subject.sample(dataset.labels[others], [picture_seed(seed, i) for i in range(count)])
    sets = {"generated": generated, "the data's": to_float(dataset.images[others])}  # the latter are the ideal
    judge = subject.judge
    features = judge.features(to_float(dataset.images[reference]))
    rows = [{"pictures": what, **asdict(compare(features, judge.features(images)))} for what, images in sets.items()]
    return Report(f"{count} pictures of {subject.denoiser.info.name} and of the data", rows)
