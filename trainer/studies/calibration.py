"""Compares an evaluator's scores with the scores that were published for the same sets of pictures. Fits nothing.

A folder holds sets.json, a list of {"folder", "conditions", "official_accuracy"}. Each set's folder holds pictures that
are numbered in the order of the conditions file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import StatisticsError, correlation, fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shared.evaluator import Evaluator, load_evaluator, score_set
from shared.pictures import to_images
from shared.vocabulary import read_test_file
from trainer.data_folder import read_picture
from trainer.errors import TrainerError
from trainer.score import targets_of
from trainer.studies.study import Report, Subject


@dataclass(frozen=True)
class Compared:
    """One set's published accuracy, and the evaluator's."""

    folder: str
    published: float
    accuracy: float


@dataclass(frozen=True)
class Agreement:
    sets: list[Compared]
    correlation: float  # Pearson's, over sets
    mean_absolute_error: float
    bias: float  # mean of ours - published


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
    folder: Path, conditions: Path, evaluator: Evaluator, advance: Callable[[], None] = lambda: None
) -> Agreement:
    """Score every set of `folder`, whose conditions files are in the folder `conditions`."""
    try:
        entries: list[dict[str, Any]] = json.loads((folder / "sets.json").read_text())
        wanted = [(str(e["folder"]), str(e["conditions"]), float(e["official_accuracy"])) for e in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{folder / 'sets.json'}: not a list of sets with a published score ({error})") from error
    compared = []
    for name, file, published in wanted:
        lists = read_test_file(conditions / file, evaluator.vocabulary)
        images = to_images(read_pictures(folder / name, len(lists)))
        probabilities = evaluator.probabilities(images)
        score = score_set(probabilities, targets_of(lists, evaluator.vocabulary), evaluator.vocabulary.names)
        compared.append(Compared(name, published, score.accuracy))
        advance()
    ours, theirs = [one.accuracy for one in compared], [one.published for one in compared]
    errors = [a - b for a, b in zip(ours, theirs, strict=True)]
    try:
        return Agreement(compared, correlation(ours, theirs), fmean(map(abs, errors)), fmean(errors))
    except StatisticsError as error:  # of fewer than two sets, or equal scores
        raise TrainerError(f"{folder / 'sets.json'}: {error}") from error


def plot(agreement: Agreement) -> bytes:
    """Plot the evaluator's accuracy over the published one, one dot a set; return the PNG."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="tab:gray", linewidth=1)
    axes.scatter([one.published for one in agreement.sets], [one.accuracy for one in agreement.sets], s=14)
    title = f"correlation {agreement.correlation:.3f}, mean absolute error {agreement.mean_absolute_error:.3f}"
    axes.set(xlabel="published accuracy", ylabel="this evaluator's", title=title, xlim=(0, 1), ylim=(0, 1))
    figure.savefig(file := io.BytesIO(), format="png", dpi=110)
    return file.getvalue()


def run(subject: Subject) -> Report:
    evaluator, (folder, *_) = load_evaluator(subject.path, subject.device), subject.data
    assert subject.conditions is not None
    advance = subject.advance("scoring sets")
    agreement = calibrate(folder, subject.conditions, evaluator, lambda: advance(1))
    rows = [
        [one.folder, f"{one.published:.3f}", f"{one.accuracy:.3f}", f"{one.accuracy - one.published:+.3f}"]
        for one in agreement.sets
    ]
    title = (
        f"{len(rows)} published sets: correlation {agreement.correlation:.4f}, mean absolute error "
        f"{agreement.mean_absolute_error:.4f}, bias {agreement.bias:+.4f}"
    )
    head = ["set", "published", "this evaluator's", "difference"]
    return Report(title, head, rows, asdict(agreement), plot(agreement))
