"""Scores a checkpoint on a test file: every list sampled and judged, run after run with other seeds.

Picture i of run r has the seed picture_seed(seed + r, i): the service's POST /score gives the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from shared.diffusion.denoise import Row, Stepper, sample
from shared.evaluator import Judge, SetScore, score_set
from shared.options import SamplingOptions, picture_seed
from shared.vocabulary import Vocabulary
from trainer.errors import TrainerError


@dataclass(frozen=True)
class ScoredRun:
    seed: int
    score: SetScore
    images: Tensor  # (N, 3, H, W)
    probabilities: Tensor  # (N, K)


def targets_of(lists: Sequence[Sequence[str]], vocabulary: Vocabulary) -> Tensor:
    """(N, K) multi-hot."""
    return torch.tensor([vocabulary.multi_hot(labels) for labels in lists])


def check_vocabularies(denoiser: Vocabulary, evaluator: Vocabulary) -> None:
    if denoiser != evaluator:
        raise TrainerError(
            "the denoiser's and the evaluator's vocabularies differ; fit an evaluator on the same labels"
        )


def score_run(
    stepper: Stepper,
    judge: Judge,
    lists: Sequence[Sequence[str]],
    options: SamplingOptions,
    seed: int,
    *,
    on_step: Callable[[Sequence[Row]], None] | None = None,
) -> ScoredRun:
    """One run: one picture per label list."""
    targets = targets_of(lists, judge.vocabulary)
    seeds = [picture_seed(seed, i) for i in range(len(lists))]
    images = sample(stepper, targets, options, seeds, on_step=on_step)
    probabilities = judge.probabilities(images)
    return ScoredRun(seed, score_set(probabilities, targets, judge.vocabulary.names), images, probabilities)


def summary(runs: Sequence[ScoredRun]) -> dict[str, Any]:
    """Maximum, mean and standard deviation over runs of accuracy, exact match and F1, and every run's own."""
    figures: dict[str, Any] = {"runs": [{"seed": run.seed, **asdict(run.score)} for run in runs]}
    for name in ("accuracy", "exact_match", "f1"):
        values = [getattr(run.score, name) for run in runs]
        figures[name] = {"max": max(values), "mean": fmean(values), "std": pstdev(values)}
    return figures


def best(runs: Sequence[ScoredRun]) -> ScoredRun:
    """The run of the highest accuracy, of equals the one of the highest exact match, then the first."""
    return max(runs, key=lambda run: (run.score.accuracy, run.score.exact_match))
