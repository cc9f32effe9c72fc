"""Compares the arrangements that a denoiser draws with the data's: a classifier two-sample test.

A classifier learns to tell drawn arrangements from the data's on one half of both, and is tested on the other half. If
it is right half of the time, it has found no difference (Lopez-Paz & Oquab 2017, section 3). It overlooks much, so
where a data set's rules of placement are known, drawn arrangements are also measured against them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, VotingClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from shared.diffusion.layouts import OUTSIDE, Layouts
from shared.options import picture_seed
from trainer.data import read_arrangements
from trainer.errors import TrainerError
from trainer.studies.study import Report, Subject

FEWEST = 50  # pictures with a number of objects; for fewer there is no test
DECIMALS = 3  # of positions: a third of a pixel of 320. Finer differences, such as in rounding, do not count
Misplaced = Callable[[Tensor], float]  # arrangements (N, K, 2) -> the share that clearly breaks the rules


@dataclass(frozen=True)
class Distinguished:
    """How often the classifier was right about pictures with a number of objects."""

    objects: int
    tested: int  # arrangements, half of them drawn
    accuracy: float
    standard_error: float  # of chance
    misplaced: float | None  # share of drawn arrangements that clearly break the data set's rules; None if it has none


def features(positions: Tensor) -> NDArray[np.float64]:
    """Describe arrangements (N, K, 2) of n objects each for a classifier: (N, F).

    They are each label's place, the places from left to right and from top to bottom, and the n smallest differences
    between two objects in x, in y and in distance.
    """
    N, n = len(positions), int((positions[0, :, 0] != OUTSIDE).sum())
    points = positions[positions[..., 0] != OUTSIDE].view(N, n, 2)
    parts = [positions.flatten(1)]
    parts += [points.gather(1, points[..., axis].argsort(1)[..., None].expand(-1, -1, 2)).flatten(1) for axis in (0, 1)]
    if n > 1:
        one, other = torch.combinations(torch.arange(n)).unbind(1)
        apart = points[:, one] - points[:, other]  # (N, pairs, 2)
        parts += [each.sort(1).values[:, :n] for each in (*apart.abs().unbind(-1), apart.norm(dim=-1))]
    return torch.cat(parts, 1).double().numpy()


def make_classifier(seed: int) -> Any:
    """Return boosted trees, which find edges and gaps, with a network, which finds smooth differences."""
    seed %= 2**32  # scikit-learn takes no larger ones
    network = make_pipeline(StandardScaler(), MLPClassifier((128, 128), early_stopping=True, random_state=seed))
    trees = HistGradientBoostingClassifier(random_state=seed)
    return VotingClassifier([("trees", trees), ("network", network)], voting="soft")


def accuracy_of_test(data: Tensor, drawn: Tensor, seed: int) -> tuple[int, float]:
    """Return how many arrangements were tested, and the share of them that the classifier was right about.

    `data` and `drawn`: (N, K, 2), of one number of objects. Row i of both has the same labels, and both are in the same
    half, so that the labels themselves tell nothing.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    (x, y), (x_test, y_test) = (
        (features(torch.cat([data[half], drawn[half]])), np.repeat([0, 1], len(half))) for half in halves
    )
    return len(y_test), float(make_classifier(seed).fit(x, y).score(x_test, y_test))


def compare_arrangements(
    prior: Layouts, positions: Tensor, *, count: int, seed: int, advance: Callable[[int], None],
    misplaced: Misplaced | None = None,
) -> list[Distinguished]:  # fmt: skip
    """Test drawn arrangements against the data's, for up to `count` pictures of each number of objects.

    positions (N, K, 2). Numbers of objects that the denoiser does not draw are left out. `advance(n)`: so many are
    drawn.
    """
    labels = (positions[..., 0] != OUTSIDE).float()
    found, numbers = [], labels.sum(1).long()
    for n in sorted({*numbers.tolist()} - {0}):  # 0 where labels are unknown
        chosen = (numbers == n).nonzero().flatten()
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))][:count]
        if len(chosen) < FEWEST:
            continue
        generators = [torch.Generator().manual_seed(picture_seed(seed, i)) for i in chosen.tolist()]
        drawn = prior.draw(labels[chosen], generators)
        advance(len(chosen))
        data, ours = (each.round(decimals=DECIMALS) for each in (positions[chosen], drawn))
        if torch.equal(data == OUTSIDE, ours == OUTSIDE):
            tested, accuracy = accuracy_of_test(data, ours, seed)
            share = misplaced(ours) if misplaced else None
            found.append(Distinguished(n, tested, accuracy, 0.5 / tested**0.5, share))
    return found


def run(subject: Subject, misplaced: Misplaced | None = None) -> Report:
    """Test the denoiser's arrangements. Of several folders, the first that shows a number of objects is compared with,
    as in training.
    """
    denoiser = subject.denoiser
    if denoiser.layouts is None:
        raise TrainerError(f"{denoiser.info.name} takes no positions, so it draws no arrangements")
    positions = read_arrangements(subject.data, denoiser.vocabulary)
    found = compare_arrangements(
        denoiser.layouts, positions, count=subject.count or 1000, seed=subject.seed,
        advance=subject.advance("drawing arrangements"), misplaced=misplaced,
    )  # fmt: skip
    if not found:
        problem = f"no number of objects that {denoiser.info.name} draws has {FEWEST} pictures"
        raise TrainerError(f"there is nothing to test: {problem}")
    return Report(f"arrangements of {denoiser.info.name} told from the data's", [asdict(one) for one in found])
