"""Compares an evaluator's scores with the scores that were published for the same sets of pictures. Fits nothing.

A folder holds sets.json, a list of {"folder", "conditions", "official_accuracy"}. Each set's folder holds pictures that
are numbered in the order of the conditions file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import StatisticsError, correlation, fmean
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

from shared.evaluator import Evaluator, load_evaluator, score_set
from shared.pictures import to_images
from shared.vocabulary import read_test_file
from trainer.data_folder import read_picture
from trainer.errors import TrainerError
from trainer.score import targets_of
from trainer.studies.study import Report, Subject


class PublishedSet(BaseModel):
    """An entry of sets.json."""

    folder: str
    conditions: str
    official_accuracy: float


SETS = TypeAdapter(Annotated[list[PublishedSet], Field(min_length=2)])


@dataclass(frozen=True)
class Compared:
    """One set's published accuracy, and the evaluator's."""

    folder: str
    published: float
    accuracy: float
    difference: float


def read_pictures(folder: Path, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read the folder's numbered PNGs in order: (count, H, W, 3)."""
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    if len(paths) != count:
        raise TrainerError(f"{folder} holds {len(paths)} numbered PNGs, its conditions file names {count}")
    pictures = [np.asarray(read_picture(path)) for path in paths]
    if len(sizes := {picture.shape for picture in pictures}) > 1:
        raise TrainerError(f"{folder} holds pictures of {len(sizes)} sizes; a set has one")
    return np.stack(pictures)


def calibrate(
    folder: Path, conditions: Path, evaluator: Evaluator, advance: Callable[[int], None] = lambda _: None
) -> list[Compared]:
    """Score every set of `folder`, whose conditions files are in the folder `conditions`.

    Raises pydantic.ValidationError for another sets.json.
    """
    compared = []
    for one in SETS.validate_json((folder / "sets.json").read_bytes()):
        lists = read_test_file(conditions / one.conditions, evaluator.vocabulary)
        images = to_images(read_pictures(folder / one.folder, len(lists)))
        probabilities = evaluator.probabilities(images)
        score = score_set(probabilities, targets_of(lists, evaluator.vocabulary), evaluator.vocabulary.names)
        published = one.official_accuracy
        compared.append(Compared(one.folder, published, score.accuracy, score.accuracy - published))
        advance(1)
    return compared


def agreement(sets: list[Compared]) -> dict[str, float]:
    """Return Pearson's correlation over sets, the mean absolute error, and the bias: the mean of ours - published.

    TrainerError where all scores are equal, which have no correlation.
    """
    try:
        r = correlation([one.accuracy for one in sets], [one.published for one in sets])
    except StatisticsError as error:
        raise TrainerError(f"the scores of {len(sets)} sets have no correlation: {error}") from error
    return {
        "correlation": r,
        "mean absolute error": fmean(abs(one.difference) for one in sets),
        "bias": fmean(one.difference for one in sets),
    }


def run(subject: Subject) -> Report:
    evaluator, (folder, *_) = load_evaluator(subject.path, subject.device), subject.data
    assert subject.conditions is not None
    sets = calibrate(folder, subject.conditions, evaluator, subject.advance("scoring sets"))
    summary = agreement(sets)
    title = f"{len(sets)} published sets: " + ", ".join(f"{name} {value:.4f}" for name, value in summary.items())
    return Report(title, [asdict(one) for one in sets], summary)
