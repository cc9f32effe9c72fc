"""Step-wise continuous batching: pictures join the batch at any step, and each leaves when its own steps are done.

Knows neither Redis nor the states of jobs: pictures go in, pictures with verdicts come out.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.contract.recipe import Recipe
from service.contract.records import FinishedPicture, Picture, Verdict
from service.telemetry.logs import get_logger
from service.worker.step_order import Workload, by_job, jobs_to_step
from service.worker.trajectory import Trajectories
from shared.device import lost
from shared.diffusion.denoise import Row, Stepper
from shared.diffusion.layouts import positions_at
from shared.evaluator import Judge, score_pictures
from shared.pictures import png_bytes, to_uint8
from shared.vocabulary import Vocabulary

log = get_logger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Failed:
    """A picture that cannot be sampled or judged, and why."""

    picture: Picture
    reason: str


class DeviceLost(RuntimeError):
    """The device failed; it computes nothing more for this process."""


Outcome = FinishedPicture | Failed
Key = tuple[str, int]
RecipeOf = Callable[[Picture, Verdict], Recipe | None]


class Engine:
    """The batch of one model: at most `max_pictures`, of any labels and options.

    From `efficient_rows` network rows on, pictures of large jobs wait for small jobs (`step_order.py`); with None, none
    wait. If a step raises, its pictures start again one at a time, and only a picture that fails alone is given up.
    `admit` and `step` raise DeviceLost if `device` itself has failed. `recipe` returns the recipe that a picture's PNG
    carries.
    """

    def __init__(
        self,
        stepper: Stepper,
        vocabulary: Vocabulary,
        judge: Judge,
        *,
        max_pictures: int,
        efficient_rows: int | None = None,
        recipe: RecipeOf = lambda picture, verdict: None,
        device: torch.device = CPU,
    ) -> None:
        if unknown := [name for name in vocabulary.names if name not in judge.vocabulary]:
            raise ValueError(f"the evaluator does not know the labels {', '.join(unknown)}")
        self.stepper, self.vocabulary, self.judge, self.max_pictures = stepper, vocabulary, judge, max_pictures
        self.efficient_rows, self.recipe, self.device = efficient_rows, recipe, device
        self.judged_at = 0.0, 0.0  # begin and end of the last judging, in seconds since 1970
        self._batch: dict[Key, tuple[Picture, Row]] = {}
        self._joined_at: dict[Key, int] = {}  # what `_computed` was when each picture of the batch joined
        self._computed = 0  # network rows so far
        self._trajectories = Trajectories()
        self._suspects: deque[Picture] = deque()  # wait until the batch is empty, then are sampled one at a time
        self._alone: Key | None = None  # the suspect that has the batch to itself
        self._failed: list[Failed] = []  # while joining; the next step returns them

    @property
    def busy(self) -> bool:
        return bool(self._batch or self._suspects or self._failed)

    @property
    def room(self) -> int:
        """How many more pictures may join now."""
        if self._suspects or self._alone:
            return 0
        return max(0, self.max_pictures - len(self._batch))

    def rows(self) -> list[tuple[Picture, Row]]:
        """Return the pictures of the batch in their current state."""
        return list(self._batch.values())

    def admit(self, pictures: Sequence[Picture]) -> None:
        """Add pictures to the batch; their first step is its next one."""
        for picture in pictures:
            try:
                labels = self.vocabulary.multi_hot(picture.labels)
                row = self.stepper.new_row(labels, picture.options, picture.seed, self._positions(picture))
            except Exception as error:
                raise_if_lost(error, self.device)
                log.exception("picture cannot be started", job_id=picture.job, picture=picture.index)
                self._failed.append(Failed(picture, reason_of(error)))
            else:
                self._batch[picture.key] = (picture, row)
                self._joined_at[picture.key] = self._computed
                self._trajectories.begin(picture, row)

    def _positions(self, picture: Picture) -> Tensor | None:
        """Return the positions that the picture asks for, (K, 2)."""
        if picture.layout is None:
            return None
        points = [(point.x, point.y) for point in picture.layout]
        return positions_at(self.vocabulary.encode(picture.labels), points, len(self.vocabulary))

    def admit_alone(self, picture: Picture) -> None:
        """Add a picture suspected of killing workers: it waits until the batch is empty, and nothing joins it."""
        self._suspects.append(picture)

    def drop(self, unwanted: Callable[[Picture], bool]) -> None:
        """Remove pictures between two steps; the others are unaffected."""
        for picture in [p for p, _ in self._batch.values() if unwanted(p)]:
            self._remove(picture)
        self._suspects = deque(picture for picture in self._suspects if not unwanted(picture))
        self._failed = [failed for failed in self._failed if not unwanted(failed.picture)]
        self._reopen_if_empty()

    def step(self) -> list[Outcome]:
        """Advance the pictures that take the next step; return those that ended, or could not be started."""
        ended: list[Outcome] = list(self._failed)
        self._failed.clear()
        if not self._batch and self._suspects:
            picture = self._suspects.popleft()
            self._alone = picture.key
            self.admit([picture])
        chosen = self._choose()
        try:
            self.stepper.step([row for _, row in chosen])
            for picture, row in chosen:
                self._trajectories.record(picture, row)
            ended += self._finish([(picture, row) for picture, row in chosen if row.done])
        except Exception as error:
            raise_if_lost(error, self.device)
            ended += self._isolate(error, [picture for picture, _ in chosen])
        for outcome in ended:
            self._remove(outcome.picture)
        self._reopen_if_empty()
        return ended

    def _reopen_if_empty(self) -> None:
        """Let pictures join again once the one that was sampled alone is gone."""
        if not self._batch:
            self._alone = None

    def _choose(self) -> list[tuple[Picture, Row]]:
        """Return the pictures that take the next step."""
        batch = self.rows()
        if self.efficient_rows is not None:
            jobs = by_job((picture.job, self._workload(picture, row)) for picture, row in batch)
            chosen = set(jobs_to_step(jobs, self._computed, self.efficient_rows))
            batch = [(picture, row) for picture, row in batch if picture.job in chosen]
        self._computed += sum(row.options.rows_per_step for _, row in batch)
        return batch

    def _workload(self, picture: Picture, row: Row) -> Workload:
        rows = row.options.rows_per_step
        return Workload(rows, rows * (len(row.table) - row.step), self._joined_at[picture.key])

    def _remove(self, picture: Picture) -> None:
        self._batch.pop(picture.key, None)
        self._joined_at.pop(picture.key, None)
        self._trajectories.forget(picture)

    def _isolate(self, error: Exception, pictures: list[Picture]) -> list[Outcome]:
        if len(pictures) == 1:
            (picture,) = pictures
            log.error("picture failed alone", job_id=picture.job, picture=picture.index, exc_info=error)
            return [Failed(picture, reason_of(error))]
        jobs = sorted({picture.job for picture in pictures})
        log.warning("batch failed; its pictures start again one at a time", jobs=jobs, exc_info=error)
        for picture in pictures:
            self._remove(picture)
        self._suspects.extend(pictures)
        return []

    def _finish(self, done: Sequence[tuple[Picture, Row]]) -> list[Outcome]:
        """Judge and encode the pictures whose steps are done."""
        broken = [picture for picture, row in done if not bool(torch.isfinite(row.x).all())]
        outcomes: list[Outcome] = [Failed(picture, "the network's output is not finite") for picture in broken]
        whole = [(picture, row) for picture, row in done if picture not in broken]
        if not whole:
            return outcomes
        images = torch.stack([row.x.float().cpu() for _, row in whole])  # (N, 3, H, W)
        begun_at = time.time()
        verdicts = judge_pictures(self.judge, [picture for picture, _ in whole], images)
        self.judged_at = begun_at, time.time()
        for (picture, _), verdict, pixels in zip(whole, verdicts, to_uint8(images), strict=True):
            outcomes.append(self._encode(picture, verdict, pixels))
        return outcomes

    def _encode(self, picture: Picture, verdict: Verdict, pixels: NDArray[np.uint8]) -> FinishedPicture:
        recipe = self.recipe(picture, verdict)
        png = png_bytes(pixels, recipe.text() if recipe else None)
        trajectory = self._trajectories.image(picture)
        if trajectory is None:
            return FinishedPicture(picture, verdict, png)
        own = recipe.model_copy(update={"trajectory": picture.trajectory}) if recipe else None
        return FinishedPicture(picture, verdict, png, png_bytes(trajectory, own.text() if own else None))


def judge_pictures(judge: Judge, pictures: Sequence[Picture], images: Tensor) -> list[Verdict]:
    """Return the verdicts on images (N, 3, H, W) of as many pictures."""
    names = judge.vocabulary.names
    probabilities = judge.probabilities(images)  # (N, K)
    targets = torch.tensor([judge.vocabulary.multi_hot(picture.labels) for picture in pictures])
    return [
        Verdict(
            index=picture.index,
            labels=picture.labels,
            seed=picture.seed,
            accuracy=score.accuracy,
            f1=score.f1,
            exact=score.exact,
            probabilities=dict(zip(names, row.tolist(), strict=True)),
        )
        for picture, row, score in zip(pictures, probabilities, score_pictures(probabilities, targets), strict=True)
    ]


def raise_if_lost(error: Exception, device: torch.device) -> None:
    """Raise DeviceLost if the device computes nothing more after this error."""
    if lost(error, device):
        raise DeviceLost(str(error)) from error


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
