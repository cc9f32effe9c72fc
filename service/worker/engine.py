"""Step-wise continuous batching: pictures join the batch at any step, and each leaves it when its own steps are done.

Knows neither Redis nor jobs' states: pictures go in, pictures with verdicts come out.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.contract.recipe import Recipe
from service.contract.records import Picture, Verdict
from service.telemetry.logs import get_logger
from service.worker.step_order import Standing, of_jobs, whose_turn
from service.worker.trajectory import Strips
from service.worker.uploaded import sent_row
from shared.device import lost
from shared.diffusion.denoise import Row
from shared.diffusion.layouts import positions_at
from shared.evaluator import Judge, score_pictures
from shared.options import SamplingOptions
from shared.pictures import png_bytes, to_uint8
from shared.vocabulary import Vocabulary

log = get_logger(__name__)

CPU = torch.device("cpu")


class RowStepper(Protocol):
    """What the engine needs of `shared.diffusion.denoise.Stepper`."""

    def new_row(
        self, labels: Sequence[float], options: SamplingOptions, seed: int, positions: Tensor | None = None
    ) -> Row: ...

    def step(self, rows: Sequence[Row]) -> None: ...


@dataclass(frozen=True)
class Made:
    """A finished picture: its verdict and its PNG."""

    picture: Picture
    verdict: Verdict
    png: bytes
    strip: bytes | None = None  # PNG of its way from noise, if asked for


@dataclass(frozen=True)
class Unmade:
    """A picture that cannot be made, and why."""

    picture: Picture
    reason: str


class DeviceLost(RuntimeError):
    """The device failed, and computes nothing more for this process."""


Outcome = Made | Unmade
Key = tuple[str, int]
RecipeOf = Callable[[Picture, Verdict], Recipe | None]


class Engine:
    """The batch of one model. At most `max_pictures` are in it; nothing about them need be equal.

    `few`: network rows from which on pictures of large jobs wait for small jobs (`turns.py`); None, and none waits.
    A step that raises is blamed on nobody: its pictures start again, one at a time, and only one that fails alone
    is given up. Where `device` itself has failed, DeviceLost leaves `admit` and `step`: no picture can be made any
    more. `recipe` says what a finished picture's PNG carries.
    """

    def __init__(
        self,
        stepper: RowStepper,
        vocabulary: Vocabulary,
        judge: Judge,
        *,
        max_pictures: int,
        few: int | None = None,
        recipe: RecipeOf = lambda picture, verdict: None,
        device: torch.device = CPU,
    ) -> None:
        if unknown := [name for name in vocabulary.names if name not in judge.vocabulary]:
            raise ValueError(f"the evaluator does not know the labels {', '.join(unknown)}")
        self.stepper, self.vocabulary, self.judge, self.max_pictures = stepper, vocabulary, judge, max_pictures
        self.few, self.recipe, self.device = few, recipe, device
        self._rows_made = 0
        self._since: dict[Key, int] = {}  # by picture in the batch: network rows that were made when it joined
        self._strips = Strips()
        self._batch: dict[Key, tuple[Picture, Row]] = {}
        self._alone: deque[Picture] = deque()  # wait until the batch is empty, then are made one at a time
        self._made_alone: Key | None = None
        self._unmade: list[Unmade] = []  # found while admitting, reported by the next step
        self.judged = 0.0, 0.0  # when pictures were judged last, in seconds since 1970

    @property
    def busy(self) -> bool:
        return bool(self._batch or self._alone or self._unmade)

    @property
    def room(self) -> int:
        """How many more pictures may join now."""
        if self._alone or self._made_alone:
            return 0
        return max(0, self.max_pictures - len(self._batch))

    def pictures(self) -> list[Picture]:
        """The pictures that are in the engine, in no order."""
        return [picture for picture, _ in self._batch.values()] + list(self._alone)

    def rows(self) -> list[tuple[Picture, Row]]:
        """The pictures of the batch as they stand."""
        return list(self._batch.values())

    def admit(self, pictures: Sequence[Picture]) -> None:
        """Pictures join the batch and take their first step with the next one of it."""
        for picture in pictures:
            try:
                labels = self.vocabulary.multi_hot(picture.labels)
                if picture.png is not None:
                    row = sent_row(picture, labels)
                else:
                    row = self.stepper.new_row(labels, picture.options, picture.seed, self._positions(picture))
            except Exception as error:
                self._check_device(error)
                log.exception("picture cannot begin", job_id=picture.job, picture=picture.index)
                self._unmade.append(Unmade(picture, _reason(error)))
            else:
                self._batch[picture.key] = (picture, row)
                self._since[picture.key] = self._rows_made
                self._strips.begin(picture, row)

    def _positions(self, picture: Picture) -> Tensor | None:
        """Where the picture's objects are to stand, (K, 2)."""
        if picture.layout is None:
            return None
        points = [(point.x, point.y) for point in picture.layout]
        return positions_at(self.vocabulary.encode(picture.labels), points, len(self.vocabulary))

    def admit_alone(self, picture: Picture) -> None:
        """A picture that is under suspicion: it is made when the batch is empty, and nothing joins it."""
        self._alone.append(picture)

    def drop(self, unwanted: Callable[[Picture], bool]) -> None:
        """Takes pictures out, within a step; the others do not notice."""
        for picture in [p for p, _ in self._batch.values() if unwanted(p)]:
            self._remove(picture)
        self._alone = deque(picture for picture in self._alone if not unwanted(picture))
        self._unmade = [unmade for unmade in self._unmade if not unwanted(unmade.picture)]
        self._let_join()

    def step(self) -> list[Outcome]:
        """One step of the batch's pictures whose turn it is; returns those that ended, or could not begin."""
        ended: list[Outcome] = list(self._unmade)
        self._unmade.clear()
        if not self._batch and self._alone:
            picture = self._alone.popleft()
            self._made_alone = picture.key
            self.admit([picture])
        turn = self._turn()
        try:
            self.stepper.step([row for _, row in turn])
            for picture, row in turn:
                self._strips.look(picture, row)
            ended += self._judge([(picture, row) for picture, row in turn if row.done])
        except Exception as error:
            self._check_device(error)
            ended += self._isolate(error, [picture for picture, _ in turn])
        for outcome in ended:
            self._remove(outcome.picture)
        self._let_join()
        return ended

    def _let_join(self) -> None:
        """Others may join again where the picture that was made alone is gone."""
        if not self._batch:
            self._made_alone = None

    def _turn(self) -> list[tuple[Picture, Row]]:
        """The pictures that take the next step."""
        batch = self.rows()
        if self.few is not None:
            jobs = of_jobs((picture.job, self._standing(picture, row)) for picture, row in batch)
            chosen = set(whose_turn(jobs, self._rows_made, self.few))
            batch = [(picture, row) for picture, row in batch if picture.job in chosen]
        self._rows_made += sum(row.options.rows_per_step for _, row in batch)
        return batch

    def _standing(self, picture: Picture, row: Row) -> Standing:
        rows = row.options.rows_per_step
        return Standing(rows, rows * (len(row.table) - row.step), self._since[picture.key])

    def _remove(self, picture: Picture) -> None:
        self._batch.pop(picture.key, None)
        self._since.pop(picture.key, None)
        self._strips.forget(picture)

    def _check_device(self, error: Exception) -> None:
        """DeviceLost for an error after which the device computes nothing."""
        if lost(error, self.device):
            raise DeviceLost(str(error)) from error

    def _isolate(self, error: Exception, pictures: list[Picture]) -> list[Outcome]:
        if len(pictures) == 1:
            (picture,) = pictures
            log.error("picture fails alone", job_id=picture.job, picture=picture.index, exc_info=error)
            return [Unmade(picture, _reason(error))]
        jobs = sorted({picture.job for picture in pictures})
        log.warning("batch failed; its pictures start again, one at a time", jobs=jobs, exc_info=error)
        for picture in pictures:
            self._remove(picture)
        self._alone.extend(pictures)
        return []

    def _judge(self, done: Sequence[tuple[Picture, Row]]) -> list[Outcome]:
        """Verdict and PNG of pictures whose steps are done."""
        broken = [picture for picture, row in done if not bool(torch.isfinite(row.x).all())]
        outcomes: list[Outcome] = [Unmade(picture, "the network's numbers are not finite") for picture in broken]
        whole = [(picture, row) for picture, row in done if picture not in broken]
        if not whole:
            return outcomes
        images = torch.stack([row.x.float().cpu() for _, row in whole])  # (N, 3, H, W)
        names = self.judge.vocabulary.names
        begun_at = time.time()
        probabilities = self.judge.probabilities(images)  # (N, K)
        self.judged = begun_at, time.time()
        targets = torch.tensor([self.judge.vocabulary.multi_hot(picture.labels) for picture, _ in whole])
        scores = score_pictures(probabilities, targets)
        for (picture, _), p, score, pixels in zip(whole, probabilities, scores, to_uint8(images), strict=True):
            verdict = Verdict(
                index=picture.index,
                labels=picture.labels,
                seed=picture.seed,
                accuracy=score.accuracy,
                f1=score.f1,
                exact=score.exact,
                probabilities=dict(zip(names, p.tolist(), strict=True)),
            )
            outcomes.append(self._made(picture, verdict, pixels))
        return outcomes

    def _made(self, picture: Picture, verdict: Verdict, pixels: NDArray[np.uint8]) -> Made:
        recipe = self.recipe(picture, verdict)
        png = picture.png or png_bytes(pixels, recipe.text() if recipe else None)
        strip = self._strips.strip(picture)
        if strip is None:
            return Made(picture, verdict, png)
        whole = recipe.model_copy(update={"trajectory": picture.trajectory}) if recipe else None
        return Made(picture, verdict, png, png_bytes(strip, whole.text() if whole else None))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
