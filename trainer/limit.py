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
from shared.evaluator import IMAGE_SIZE, load_evaluator, score_set
from shared.pictures import to_images
from shared.vocabulary import ICLEVR, read_test_file
from trainer.errors import TrainerError
from trainer.render import render, squeeze
from trainer.render_folder import scene_objects
from trainer.score import ScoredRun, summary, targets_of


def render_runs(
    file: Path, repeats: int, storage: Path, evaluator: str | None, seed: int, device: str, progress: Progress
) -> tuple[list[ScoredRun], dict[str, Any]]:
    """Runs as `trainer score` has them, of renders instead of samples: object placements differ from run to run.

    TrainerError where the evaluator's labels are not i-CLEVR's, the only ones that can be rendered.
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
        images = to_images(squeeze(render(scenes, samples=1), IMAGE_SIZE))
        probabilities = judge.probabilities(images)
        runs.append(ScoredRun(seed + r, score_set(probabilities, targets, ICLEVR.names), images, probabilities))
        progress.advance(task)
    rate = repeats * len(lists) / (time.monotonic() - start)
    figures = {"file": file.name, "model": "fresh renders", "pictures_per_s": rate, "rows_per_picture": 0.0}
    return runs, figures | summary(runs)
