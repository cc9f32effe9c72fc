"""Adds to the study of arrangements which of i-CLEVR's objects break the renderer's rules of placement."""

from __future__ import annotations

from torch import Tensor

from iclevr.labels import ICLEVR
from iclevr.scenes.scene import breaches, ground_position
from shared.diffusion.layouts import OUTSIDE
from trainer.studies import arrangements
from trainer.studies.study import Report, Subject

CLEARLY = 0.1  # world units by which a rule is broken: a twelfth of an object's width, a hundredth of the picture's


def share_misplaced(positions: Tensor) -> float:
    """Return the share of arrangements (N, K, 2) of i-CLEVR's objects that the renderer would clearly not make."""
    found = 0
    for row in positions.double():
        ground = [ground_position((x, y)) for x, y in row[row[:, 0] != OUTSIDE].tolist()]
        found += any(breach > CLEARLY for i, place in enumerate(ground) for breach in breaches(ground[:i], *place))
    return found / len(positions)


def run(subject: Subject) -> Report:
    """Run the trainer's study, and measure arrangements of i-CLEVR's objects against the rules."""
    ruled = all(name in ICLEVR for name in subject.denoiser.info.vocabulary)
    return arrangements.run(subject, share_misplaced if ruled else None)
