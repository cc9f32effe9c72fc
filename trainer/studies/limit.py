"""The practical ceiling of a score: what fresh renders of a test file's label lists score.

A denoiser that places objects as the renders do cannot be expected to score higher. An evaluator's errors lower the
ceiling, and so do objects that hide each other. A denoiser may keep its objects apart (`shared/diffusion/layouts.py`);
its ceiling is that of renders whose objects keep as far apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from shared.diffusion.layouts import RememberedLayouts, nearest_pair
from shared.diffusion.model import Denoiser
from shared.evaluator import Evaluator, judge_of, score_set
from shared.pictures import to_images
from shared.vocabulary import ICLEVR, read_test_file
from trainer.config import Fit
from trainer.data import pad
from trainer.errors import TrainerError
from trainer.scenes.render import render, squeeze
from trainer.scenes.render_folder import scene_objects
from trainer.scenes.scene import SceneObject, picture_position
from trainer.score import ScoredRun, summary, targets_of

MOST_TRIES = 2000  # random scenes; half of them keep objects as far apart as i-CLEVR does


def distances_of(denoiser: Denoiser) -> list[float]:
    """Return the smallest distance of two objects in a denoiser's arrangements of 1, 2, ... objects."""
    if not isinstance(denoiser.layouts, RememberedLayouts):
        raise TrainerError(f"{denoiser.info.name} draws no arrangements, so --placed-as cannot follow them")
    return [min(map(nearest_pair, points[:, :n])) for n, points in enumerate(denoiser.layouts.points, 1)]


def scene_apart(labels: list[str], rng: np.random.Generator, apart: Sequence[float]) -> list[SceneObject]:
    """Return a random scene whose n objects keep at least apart[n - 1] of the picture apart.

    Where `apart` has no entry for n, any scene will do.
    """
    least = apart[len(labels) - 1] if len(labels) <= len(apart) else 0.0
    for _ in range(MOST_TRIES):
        scene = scene_objects(labels, rng)
        if nearest_pair(torch.tensor([picture_position(placed) for placed in scene])) >= least:
            return scene
    raise TrainerError(f"no scene found whose {len(labels)} objects keep {least:.2f} of the picture apart")


def render_runs(
    file: Path, evaluator: Evaluator, *, repeats: int, seed: int, progress: Progress,
    size: int, fit: Fit, keep_padding: bool = False, placed_as: Denoiser | None = None,
) -> tuple[list[ScoredRun], dict[str, Any]]:  # fmt: skip
    """Score renders as `trainer.score.score_file` scores samples. Each run places the objects anew.

    `placed_as`: a denoiser; objects keep as far apart as in its arrangements.
    """
    if evaluator.vocabulary != ICLEVR:
        raise TrainerError("only i-CLEVR's objects can be rendered; the evaluator has other labels")
    lists = read_test_file(file, ICLEVR)
    targets, apart = targets_of(lists, ICLEVR), distances_of(placed_as) if placed_as else []
    task = progress.add_task(f"rendering {file.name}", total=repeats)
    start, runs = time.monotonic(), []
    for r in range(repeats):
        rng = np.random.default_rng([seed + r, 3])
        scenes = [scene_apart(labels, rng, apart) for labels in lists]
        film = render(scenes, samples=1)  # (N, H, W, 3)
        aspect = film.shape[2] / film.shape[1] if fit == "pad" and not keep_padding else 1.0
        images = to_images(squeeze(pad(film) if fit == "pad" else film, size))
        probabilities = judge_of(evaluator, aspect).probabilities(images)
        runs.append(ScoredRun(seed + r, score_set(probabilities, targets, ICLEVR.names), images))
        progress.advance(task)
    figures = {
        "file": file.name,
        "model": "fresh renders",
        "size": size,
        "placed_as": placed_as.info.name if placed_as else None,
        "padding": "none" if fit == "squeeze" else "kept" if keep_padding else "cut",
        "pictures_per_s": repeats * len(lists) / (time.monotonic() - start),
        "rows_per_picture": 0.0,
    }
    return runs, figures | summary(runs)
