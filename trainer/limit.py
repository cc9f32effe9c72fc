"""The limit of the data: what fresh renders of a test file's label lists score, where objects may hide one another.

No denoiser can be expected to score above it; an evaluator that errs lowers it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from shared.checkpoint import resolve
from shared.device import pick_device
from shared.evaluator import IMAGE_SIZE, judge_of, load_evaluator, score_set
from shared.pictures import to_images
from shared.vocabulary import ICLEVR, read_test_file
from trainer.config import Fit
from trainer.data import pad
from trainer.errors import TrainerError
from trainer.render import render, squeeze
from trainer.render_folder import scene_objects
from trainer.score import ScoredRun, summary, targets_of


def render_runs(
    file: Path, repeats: int, storage: Path, evaluator: str | None, seed: int, device: str, progress: Progress,
    *, size: int = IMAGE_SIZE, fit: Fit = "squeeze", keep_padding: bool = False,
) -> tuple[list[ScoredRun], dict[str, Any]]:  # fmt: skip
    """Runs as `trainer score` has them, of renders instead of samples: object placements differ from run to run.

    Pictures have `size` x `size` pixels, squeezed or padded; of padded ones the evaluator is shown what lies between
    the borders, or with `keep_padding` all. TrainerError where the evaluator's labels are not i-CLEVR's, the only ones
    that can be rendered.
    """
    judge = load_evaluator(resolve(storage, evaluator, "evaluator"), pick_device(device))
    if judge.vocabulary != ICLEVR:
        raise TrainerError("only i-CLEVR's objects can be rendered; the evaluator has other labels")
    lists = read_test_file(file, ICLEVR)
    targets = targets_of(lists, ICLEVR)
    task = progress.add_task(f"rendering {file.name}", total=repeats)
    start, runs = time.monotonic(), []
    for r in range(repeats):
        rng = np.random.default_rng([seed + r, 3])
        scenes = [scene_objects(labels, rng) for labels in lists]
        film = render(scenes, samples=1)  # (N, H, W, 3)
        aspect = film.shape[2] / film.shape[1] if fit == "pad" and not keep_padding else 1.0
        images = to_images(squeeze(pad(film) if fit == "pad" else film, size))
        probabilities = judge_of(judge, aspect).probabilities(images)
        runs.append(ScoredRun(seed + r, score_set(probabilities, targets, ICLEVR.names), images, probabilities))
        progress.advance(task)
    rate = repeats * len(lists) / (time.monotonic() - start)
    form = "kept" if keep_padding else "cut"
    figures: dict[str, Any] = {"file": file.name, "model": "fresh renders", "size": size}
    figures |= {"padding": form if fit == "pad" else "none", "pictures_per_s": rate, "rows_per_picture": 0.0}
    return runs, figures | summary(runs)
