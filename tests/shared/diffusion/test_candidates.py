"""The best of several candidates: the one whose labels help the network most to predict it."""

import torch
from torch import Tensor

from shared.diffusion.candidates import LOG_SNRS, evidence, sample_best
from shared.diffusion.denoise import Row, Stepper, sample
from shared.diffusion.path import NoisePath
from shared.diffusion.schedules import alpha_bar
from shared.options import SamplingOptions, picture_seed
from tests.toy import ToyNetwork

AB = alpha_bar("cosine", 100)
OPTIONS = SamplingOptions(steps=3, guidance=1.0)


class Expecting(ToyNetwork):
    """A network that predicts v of a picture of ones where it is told label 0, and else of a picture of zeros."""

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        super().__call__(x, t, labels, keep)
        a, s = (part.float()[:, None, None, None] for part in (AB[t].sqrt(), (1 - AB[t]).sqrt()))
        x0 = (labels[:, 0] * keep)[:, None, None, None].expand_as(x)
        return (a * x - x0) / s


def expecting() -> Stepper:
    return Stepper(Expecting(AB), NoisePath(AB, "v"), max_rows=2)


def finished(stepper: Stepper, value: float) -> Row:
    row = stepper.new_row(torch.eye(stepper.network.num_labels)[0], OPTIONS, seed=0)
    row.x = torch.full_like(row.x, value)
    return row


def test_evidence_is_the_share_of_the_error_that_labels_remove() -> None:
    stepper = expecting()
    rows = [finished(stepper, value) for value in (1.0, 0.5, 0.0)]
    without, with_labels = torch.tensor([1.0, 0.25, 0.0]), torch.tensor([0.0, 0.25, 1.0])
    expected = len(LOG_SNRS) * (without - with_labels) / without.mean()
    torch.testing.assert_close(evidence(stepper, rows, seed=1), expected, rtol=1e-3, atol=1e-3)
    assert stepper.network_rows == 2 * len(LOG_SNRS) * len(rows)


def test_the_candidate_with_most_evidence_is_kept() -> None:
    network = ToyNetwork(AB)
    stepper = Stepper(network, NoisePath(AB, "v"))
    labels, seeds = torch.eye(network.num_labels)[:3], [5, 6, 7]
    best = sample_best(stepper, labels, OPTIONS, seeds, 4)
    for own, seed, picture in zip(labels, seeds, best, strict=True):
        drawn = [seed, *(picture_seed(seed, j) for j in (1, 2, 3))]
        rows = [stepper.new_row(own, OPTIONS, one) for one in drawn]
        while any(not row.done for row in rows):
            stepper.step(rows)
        assert torch.equal(picture, rows[int(evidence(stepper, rows, seed).argmax())].x)


def test_a_single_candidate_is_what_is_sampled_anyway() -> None:
    network = ToyNetwork(AB)
    stepper = Stepper(network, NoisePath(AB, "v"))
    labels = torch.eye(network.num_labels)[:2]
    steps: list[int] = []
    best = sample_best(stepper, labels, OPTIONS, [1, 2], 1, on_step=lambda rows: steps.append(len(rows)))
    torch.testing.assert_close(best, sample(stepper, labels, OPTIONS, [1, 2]))
    assert steps == [1] * 6
