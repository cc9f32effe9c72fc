"""Measures what drawing pictures until they are exact gains, and how far the evaluator that selects flatters itself.

A second evaluator, which selects nothing, judges the same pictures before and after the selection. If its exact match
rises less than the first one's, the difference is the first one's bias.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from shared.evaluator import Evaluator, PictureScore, score_pictures
from shared.options import attempt_seed, picture_seed
from shared.vocabulary import Vocabulary
from trainer.errors import TrainerError
from trainer.score import Lists, evaluator_path, open_evaluator, targets_of
from trainer.studies.study import Report, Subject

MOST_OBJECTS = 10  # as `evaluate --objects` takes


@dataclass(frozen=True)
class Selection:
    """Exact match by both evaluators of pictures that one of them selected, beside their first attempts."""

    objects: int
    first: float  # exact match of the first attempts,
    selected: float  # and of the kept ones, by the evaluator that selects
    second_first: float  # the same by the other one
    second_selected: float
    attempts: float  # mean
    rows: float  # network rows a picture, of all its attempts
    extra_rows: float  # of those after the first


def run(subject: Subject) -> Report:
    """Draw random label lists of each number of objects, by default of all that the denoiser has learnt."""
    denoiser, count = subject.denoiser, subject.count or 64
    second = open_evaluator(evaluator_path(subject.storage, subject.second, denoiser.info), subject.device)
    if second.info == subject.judge.info:
        raise TrainerError("--second is the evaluator that selects; train another one with another --set seed=")
    few, many = denoiser.info.support.objects
    measured = [
        measure(subject, second, random_lists(denoiser.vocabulary, n, count, subject.seed))
        for n in subject.objects or range(max(1, few), min(many, MOST_OBJECTS, len(denoiser.vocabulary)) + 1)
    ]
    title = f"exact match of {count} pictures each, of one and of up to {subject.attempts} attempts, by two evaluators"
    return Report(title, [asdict(one) for one in measured])


def random_lists(vocabulary: Vocabulary, objects: int, count: int, seed: int) -> list[list[str]]:
    """Draw lists of so many distinct labels. TrainerError if there are not as many."""
    if objects > len(vocabulary):
        raise TrainerError(f"--objects {objects}: there are {len(vocabulary)} labels")
    rng = np.random.default_rng([seed, 0])
    return [[vocabulary.names[i] for i in rng.permutation(len(vocabulary))[:objects]] for _ in range(count)]


def measure(subject: Subject, second: Evaluator, lists: Lists) -> Selection:
    """Draw a picture for each list as the service does with `until`: an attempt is kept if none before has its F1."""
    targets, before = targets_of(lists, subject.denoiser.vocabulary), subject.stepper.network_rows
    judges = [(judge, targets_of(lists, judge.vocabulary)) for judge in (subject.judge, second)]
    left, first_rows = list(range(len(lists))), 0
    first, kept = dict[int, tuple[PictureScore, ...]](), dict[int, tuple[PictureScore, ...]]()
    drawn = dict[int, int]()
    for attempt in range(1, subject.attempts + 1):
        seeds = [attempt_seed(picture_seed(subject.seed, i), attempt) for i in left]
        images = subject.sample(targets[left], seeds)
        scores = (score_pictures(judge.probabilities(images), asked[left]) for judge, asked in judges)
        for i, verdicts in zip(left, zip(*scores, strict=True), strict=True):
            drawn[i] = attempt
            first.setdefault(i, verdicts)
            if i not in kept or _rank(verdicts[0]) > _rank(kept[i][0]):
                kept[i] = verdicts
        if attempt == 1:
            first_rows = subject.stepper.network_rows - before
        left = [i for i in left if not kept[i][0].exact]
        if not left:
            break
    rows, n = subject.stepper.network_rows - before, len(lists)

    def exact(pictures: dict[int, tuple[PictureScore, ...]], judge: int) -> float:
        return sum(scores[judge].exact for scores in pictures.values()) / n

    return Selection(
        objects=len(lists[0]),
        first=exact(first, 0),
        selected=exact(kept, 0),
        second_first=exact(first, 1),
        second_selected=exact(kept, 1),
        attempts=sum(drawn.values()) / n,
        rows=rows / n,
        extra_rows=(rows - first_rows) / n,
    )


def _rank(score: PictureScore) -> tuple[float, float]:
    return score.f1, score.accuracy
