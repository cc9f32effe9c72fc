"""The limit of the data: what fresh renders of a test file's label lists score.

No denoiser that puts objects where they do can be expected to score above it; an evaluator that errs lowers it. Where
objects stand near one another, one hides the other: a denoiser may keep them apart (`shared/diffusion/layouts.py`), and then its
limit is that of renders that do so too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from shared.device import pick_device
from shared.diffusion.layouts import nearest_pair
from shared.diffusion.model import load_denoiser
from shared.evaluator import IMAGE_SIZE, judge_of, load_evaluator, score_set
from shared.pictures import to_images
from shared.registry import resolve
from shared.vocabulary import ICLEVR, read_test_file
from trainer.config import Fit
from trainer.data import pad
from trainer.errors import TrainerError
from trainer.scenes.render import render, squeeze
from trainer.scenes.render_folder import scene_objects
from trainer.scenes.scene import SceneObject, picture_position
from trainer.score import ScoredRun, summary, targets_of

MOST_TRIES = 2000  # scenes; half of those that come by chance keep i-CLEVR's objects apart


def distances_of(storage: Path, name: str) -> list[float]:
    """The least distance between two objects in a denoiser's arrangements, of 1, 2, ... objects."""
    layouts = load_denoiser(resolve(storage, name, "denoiser")).layouts
    if layouts is None:
        raise TrainerError(f"{name} draws no arrangements; its objects stand as they come")
    return [min(map(nearest_pair, points[:, :n])) for n, points in enumerate(layouts.points, 1)]


def scene_apart(labels: list[str], rng: np.random.Generator, apart: Sequence[float]) -> list[SceneObject]:
    """A scene whose nearest two objects of n are at least apart[n - 1] from each other in the picture; any beyond.

    TrainerError where none is found, as for arrangements of other pictures.
    """
    least = apart[len(labels) - 1] if len(labels) <= len(apart) else 0.0
    for _ in range(MOST_TRIES):
        scene = scene_objects(labels, rng)
        if nearest_pair(torch.tensor([picture_position(placed) for placed in scene])) >= least:
            return scene
    raise TrainerError(f"no scene found whose {len(labels)} objects keep {least:.2f} of the picture apart")


def render_runs(
    file: Path, repeats: int, storage: Path, evaluator: str | None, seed: int, device: str, progress: Progress,
    *, size: int = IMAGE_SIZE, fit: Fit = "squeeze", keep_padding: bool = False, placed_as: str | None = None,
) -> tuple[list[ScoredRun], dict[str, Any]]:  # fmt: skip
    """Runs as `trainer score` has them, of renders instead of samples: object placements differ from run to run.

    Pictures have `size` x `size` pixels, squeezed or padded; of padded ones the evaluator is shown what lies between
    the borders, or with `keep_padding` all. `placed_as`: a denoiser; objects keep as far apart as in its arrangements.
    TrainerError where that one has none, or the evaluator's labels are not i-CLEVR's, the only ones that can be
    rendered.
    """
    judge = load_evaluator(resolve(storage, evaluator, "evaluator"), pick_device(device))
    if judge.vocabulary != ICLEVR:
        raise TrainerError("only i-CLEVR's objects can be rendered; the evaluator has other labels")
    lists = read_test_file(file, ICLEVR)
    targets, apart = targets_of(lists, ICLEVR), distances_of(storage, placed_as) if placed_as else []
    task = progress.add_task(f"rendering {file.name}", total=repeats)
    start, runs = time.monotonic(), []
    for r in range(repeats):
        rng = np.random.default_rng([seed + r, 3])
        scenes = [scene_apart(labels, rng, apart) for labels in lists]
        film = render(scenes, samples=1)  # (N, H, W, 3)
        aspect = film.shape[2] / film.shape[1] if fit == "pad" and not keep_padding else 1.0
        images = to_images(squeeze(pad(film) if fit == "pad" else film, size))
        probabilities = judge_of(judge, aspect).probabilities(images)
        runs.append(ScoredRun(seed + r, score_set(probabilities, targets, ICLEVR.names), images, probabilities))
        progress.advance(task)
    rate = repeats * len(lists) / (time.monotonic() - start)
    form = "kept" if keep_padding else "cut"
    figures: dict[str, Any] = {"file": file.name, "model": "fresh renders", "size": size, "placed_as": placed_as}
    figures |= {"padding": form if fit == "pad" else "none", "pictures_per_s": rate, "rows_per_picture": 0.0}
    return runs, figures | summary(runs)
