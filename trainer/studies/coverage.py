"""Measures whether generated pictures look like the data's, cover all of it, and are no copies of it.

Pictures are compared by an evaluator's features. Scores say none of this: a model that draws one good picture for each
label list is always right. None of the figures says whether the labels are right.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from shared.options import picture_seed
from trainer.data import labelled, to_float
from trainer.errors import TrainerError
from trainer.studies.memorisation import closeness_to_training, row
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


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the unbiased squared kernel distance of features (N, D) and (M, D): KID (Binkowski et al. 2018, eq. 4).

    The kernel is (x y / D + 1)^3 (sec. 3). Alike pictures have 0 in the mean, however few they are, so single figures
    may be negative. Over all pictures at once, not over subsets, whose mean it is.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:  # the mean over pairs of different pictures
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


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


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances (N, M), exact where they are zero."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def run(subject: Subject) -> Report:
    """Compare generated pictures with as many of the data's, and as many other ones of the data's as well.

    The generated pictures have the label lists of the latter, so that both would score alike if they looked alike. With
    `subject.trained_on`, also see how near both are to training pictures (`memorisation.py`), and show the nearest.
    """
    dataset, count, seed = labelled(subject.dataset), subject.count or 1000, subject.seed
    if len(dataset) < 2 * count or count <= NEIGHBOURS:
        most = f"at most {len(dataset) // 2} pictures: half of those with labels"
        raise TrainerError(f"--count {count} needs more than {NEIGHBOURS} and {most}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[: 2 * count]
    reference, others = order.view(2, count)
    generated = subject.sample(dataset.labels[others], [picture_seed(seed, i) for i in range(count)])
    unseen, judge = to_float(dataset.images[others]), subject.judge
    wanted, *found = (judge.features(one) for one in (to_float(dataset.images[reference]), generated, unseen))
    ours, theirs = (
        {**asdict(compare(wanted, one)), "KID": kernel_distance(wanted, one), "Frechet": frechet_distance(wanted, one)}
        for one in found
    )
    rows, png = [row(name, ours[name], theirs[name], "the data's") for name in ours], None
    if subject.trained_on:
        more, png = closeness_to_training(subject, generated, unseen)
        rows += more
    return Report(f"{count} pictures of {subject.denoiser.info.name} and of the data", rows, png=png)
