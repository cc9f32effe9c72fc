"""Experiment trackers beside a run's own log and TensorBoard: Weights & Biases, MLflow and Trackio.

None is a dependency, since their pins would hold others back. Each finds its server and key as its own documentation
says. A run that resumes goes on in the same run of the tracker, whose id is kept in the run's folder, in TRACKER.txt.
"""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from trainer.errors import TrainerError

TrackerName = Literal["wandb", "mlflow", "trackio"]
Log = Callable[[dict[str, float], int], object]  # of figures by name, at a step

PROJECT: Final = "labelgrid"  # wandb's and trackio's project, mlflow's experiment

log = logging.getLogger(__name__)


def check_tracker(name: TrackerName | None) -> None:
    """Raise TrainerError if the tracker's package is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise TrainerError(f"--tracker {name} needs its package: pip install {name}")


@contextmanager
def tracking(name: TrackerName | None, folder: Path, config: dict[str, Any]) -> Iterator[Log]:
    """Yield a function that sends figures to the tracker's run of this folder, or nowhere without a tracker.

    A tracker that fails in the middle of a run, as without a network, costs figures there, and not the run.
    """
    if name is None:
        yield lambda figures, step: None
        return
    with TRACKERS[name](folder, config) as send:

        def record(figures: dict[str, float], step: int) -> None:
            try:
                send(figures, step)
            except Exception as error:
                log.warning("%s did not take the figures of step %d: %s", name, step, error)

        yield record


@contextmanager
def _wandb(folder: Path, config: dict[str, Any]) -> Iterator[Log]:
    import wandb

    run_id = _kept(folder, "wandb") or _keep(folder, "wandb", uuid.uuid4().hex)
    with wandb.init(
        project=PROJECT, id=run_id, name=folder.name, resume="allow", dir=folder, config=config
    ) as run:  # fmt: skip
        yield lambda figures, step: run.log(figures, step=step)


@contextmanager
def _mlflow(folder: Path, config: dict[str, Any]) -> Iterator[Log]:
    import mlflow

    mlflow.set_experiment(PROJECT)
    before = _kept(folder, "mlflow")
    with mlflow.start_run(run_id=before, run_name=None if before else folder.name) as run:
        _keep(folder, "mlflow", run.info.run_id)
        if before is None:
            mlflow.log_params(config)
        yield lambda figures, step: mlflow.log_metrics(figures, step=step)


@contextmanager
def _trackio(folder: Path, config: dict[str, Any]) -> Iterator[Log]:
    import trackio

    name = _kept(folder, "trackio") or _keep(folder, "trackio", f"{folder.name}-{uuid.uuid4().hex[:8]}")
    trackio.init(project=PROJECT, name=name, resume="allow", config=config)
    try:
        yield lambda figures, step: trackio.log(figures, step=step)
    finally:
        trackio.finish()


TRACKERS: Final[dict[TrackerName, Callable[[Path, dict[str, Any]], AbstractContextManager[Log]]]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _kept(folder: Path, tracker: str) -> str | None:
    """Return the tracker's id of this folder's run, if it has one."""
    path = folder / f"{tracker}.txt"
    return path.read_text() if path.exists() else None


def _keep(folder: Path, tracker: str, run_id: str) -> str:
    (folder / f"{tracker}.txt").write_text(run_id)
    return run_id
