"""Edits of pictures while what they need breaks. Pictures in progress are those of a model that knows positions."""

import contextlib
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx

from faults.harness import Stack, expect
from faults.trial import BODIES as OF_ALL
from faults.trial import Trial
from tests.toy_checkpoint import publish_toy_denoiser

MODEL = "placing"
EDITS: Any = [
    {"move": {"label": "red cube", "x": 0.5, "y": 0.5}},
    {"recolour": {"label": "red cube", "to": "cyan cube"}},
    {"add": {"label": "gray sphere", "x": 0.7, "y": 0.6}},
]
SOURCE: Any = {"model": MODEL, "labels": [["red cube", "blue sphere"]], "steps": 400, "seed": 7}
# More pictures than two batches have, so that some are in progress once the first one is finished.
SEVERAL: Any = {
    "model": MODEL, "labels": [["red cube"], ["red cube", "blue cube"]] * 20, "steps": 20, "seed": 8,
    "until": "exact", "attempts": 4, "edits": EDITS,
}  # fmt: skip
BODIES = [SEVERAL, {**SOURCE, "edits": EDITS}]
SEVERAL_EDITED, ONE_EDITED = range(len(OF_ALL), len(OF_ALL) + len(BODIES))


def publish(stack: Stack) -> str:
    """Publish a model that knows positions, and return its digest."""
    return publish_toy_denoiser(stack.folder / "storage", MODEL, 2, positions=True).digest


@contextlib.contextmanager
def placing(stack: Stack) -> Iterator[None]:
    """Run the service with that model, whose pictures in progress the trial watches."""
    stack.digest = publish(stack)
    yield


def worker_killed_at_edits(trial: Trial) -> None:
    """`kill -9` of one of two workers that draw edited pictures until exact, each four times"""
    victim = trial.begin([SEVERAL_EDITED])
    trial.strike(partial(trial.stack.signal, victim, signal.SIGKILL))
    trial.recover()


def edited_job_deleted(trial: Trial) -> None:
    """while a picture is edited, its job is deleted and the worker killed: the edit finishes, a later one is refused"""
    source = trial.post(SOURCE)["id"]
    trial.must_finish(source)
    trial.wait([source])
    path = f"/jobs/{source}/images/0/edit"
    trial.jobs[trial.post({"edits": EDITS}, path=path, Prefer="respond-async")["id"]] = ONE_EDITED
    victim = trial.busiest()

    def delete() -> None:
        trial.deleted.add(source)
        expect(httpx.delete(f"{trial.stack.address}/jobs/{source}", timeout=30), 200)
        trial.stack.signal(victim, signal.SIGKILL)
        expect(httpx.post(trial.stack.address + path, json={"edits": EDITS}, timeout=30), 404, 410)

    trial.strike(delete)
    trial.recover()
