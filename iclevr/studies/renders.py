"""The practical ceiling of a score: what fresh renders of a test file's label lists score.

A denoiser that places objects as the renders do cannot be expected to score higher. An evaluator's errors lower the
ceiling, and so do objects that partly hide each other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from torch import Tensor

from iclevr.labels import ICLEVR
from iclevr.scenes.render import jittered_lamps, render, squeeze
from iclevr.scenes.render_folder import scene_objects
from iclevr.scenes.scene import SceneObject
from shared.evaluator import Evaluator, cropping_judge, score_set
from shared.pictures import to_images
from shared.vocabulary import Vocabulary, read_test_file
from trainer.config import Fit
from trainer.data import named, pad
from trainer.errors import TrainerError
from trainer.score import Lists, ScoredRun, summary, targets_of


@dataclass(frozen=True)
class Renders:
    scenes: list[list[SceneObject]]  # objects in the order of the labels
    images: Tensor  # (N, 3, S, S) in [-1, 1]
    aspect: float  # width over height before padding; 1 if squeezed


def check_renders(vocabulary: Vocabulary, model: str) -> None:
    """Raise TrainerError, which names the `model`, if it does not know all labels of renders. It may know more."""
    if unknown := [name for name in ICLEVR.names if name not in vocabulary]:
        raise TrainerError(f"only i-CLEVR's objects can be rendered, and {model} does not know {named(unknown)}")


def fresh_renders(
    lists: Lists, rng: np.random.Generator, *, centre: float = 1.0, size: int = 64, fit: Fit = "squeeze"
) -> Renders:
    """Render a new scene for each label list, placed and lit as `trainer render` does.

    `centre`: the share of scenes with their first object in the centre. `size`: pixels a side.
    """
    scenes = [scene_objects(list(labels), rng, centre=bool(rng.random() < centre)) for labels in lists]
    film = render(scenes, samples=1, lamps=np.array([jittered_lamps(rng) for _ in scenes]))  # (N, H, W, 3)
    if fit == "squeeze":
        return Renders(scenes, to_images(squeeze(film, size)), 1.0)
    return Renders(scenes, to_images(squeeze(pad(film), size)), film.shape[2] / film.shape[1])


def render_runs(
    file: Path, evaluator: Evaluator, *, repeats: int, seed: int, progress: Progress,
    centre: float, size: int, fit: Fit, keep_padding: bool = False,
) -> tuple[list[ScoredRun], dict[str, Any]]:  # fmt: skip
    """Score renders as `trainer.score.score_file` scores samples. Each run places the objects anew."""
    check_renders(evaluator.vocabulary, "the evaluator")
    lists = read_test_file(file, ICLEVR)
    targets = targets_of(lists, evaluator.vocabulary)
    task = progress.add_task(f"rendering {file.name}", total=repeats)
    start, runs = time.monotonic(), []
    for r in range(repeats):
        fresh = fresh_renders(lists, np.random.default_rng([seed + r, 3]), centre=centre, size=size, fit=fit)
        judge = cropping_judge(evaluator, 1.0 if keep_padding else fresh.aspect)
        score = score_set(judge.probabilities(fresh.images), targets, evaluator.vocabulary.names)
        runs.append(ScoredRun(seed + r, score, fresh.images))
        progress.advance(task)
    figures = {
        "file": file.name,
        "model": "fresh renders",
        "size": size,
        "centre": centre,
        "padding": "none" if fit == "squeeze" else "kept" if keep_padding else "cut",
        "pictures_per_s": repeats * len(lists) / (time.monotonic() - start),
        "rows_per_picture": 0.0,
    }
    return runs, figures | summary(runs)
