"""Step-wise continuous batching: pictures join the batch at any step, and each leaves when its own steps are done.

Knows neither Redis nor the states of jobs: pictures go in, pictures with verdicts come out.
"""

import base64
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.contract.recipe import Recipe
from service.contract.records import FinishedPicture, Picture, Verdict
from service.worker.attempts import final_verdict, following, is_better, judge_pictures, new_rows, places_in
from service.worker.judge import Failed, Outcome, PictureKey, end_pictures
from service.worker.step_order import Workload, jobs_to_step, room
from shared.device import THREADS, overlaps
from shared.diffusion.denoise import Row, Stepper
from shared.evaluator import Judge
from shared.pictures import png_bytes, resized, sheet, to_uint8
from shared.vocabulary import Vocabulary

PREVIEW_SIDE = 64  # pixels at most


@dataclass(frozen=True)
class BatchSizes:
    pictures: int  # of a batch
    rows: int  # largest network call
    efficient_rows: int | None = None  # from which large jobs wait for small ones; None: all pictures step together
    late_pictures: int = 0  # that may join beyond `pictures`, a few at each step


@dataclass(frozen=True)
class Drawn:
    """An attempt at a picture, its verdict, its pixels (H, W, 3), and the frames of its trajectory, (h, w, 3) each."""

    verdict: Verdict
    pixels: NDArray[np.uint8]
    frames: list[NDArray[np.uint8]]

    def or_better(self, other: "Drawn | None") -> "Drawn":
        """Return the better one: of the higher F1, then accuracy; of equals the other one, which is earlier."""
        return self if other is None or is_better(self.verdict, other.verdict) else other


@dataclass(eq=False)
class Member:
    """An attempt at a picture, in the batch."""

    picture: Picture
    row: Row
    joined_at: int  # network rows that the batch had computed then
    shape: tuple[int, int, int]  # (C, H, W) of the finished picture
    before: Sequence[Verdict] = ()  # on earlier attempts
    best: Drawn | None = None  # of them
    frames: list[NDArray[np.uint8]] = field(default_factory=list)  # of its trajectory

    def record(self) -> None:
        """Keep a frame if the trajectory has a stage at the current step."""
        n = self.picture.trajectory
        if n is not None and self.row.step in stages(n, len(self.row.table)):
            # x_t, clipped to [-1, 1], as it is now (H, W, 3). A copy, because `row.x` is a view of the batch.
            self.frames.append(to_uint8(resized(self.row.x[None], frame_size(self.row.x.shape, self.shape)))[0])

    def preview(self) -> str:
        """Return x0_hat in the proportions of the picture, as the data URL of a small PNG. It has taken a step.

        No side has more than PREVIEW_SIDE pixels.
        """
        assert self.row.x0_hat is not None
        _, height, width = self.shape
        scale = min(1.0, PREVIEW_SIDE / max(height, width))
        size = max(1, round(scale * height)), max(1, round(scale * width))
        (small,) = to_uint8(resized(self.row.x0_hat[None], size))
        return "data:image/png;base64," + base64.b64encode(png_bytes(small)).decode()


class Engine:
    """The batch of one model: pictures of any labels and options, of which large jobs may have to wait.

    A `PictureEngine` of `models.py`. If a step raises, it is repeated for each half of its pictures; only a picture
    that fails alone is given up. `recipe` returns the recipe that a picture's PNG carries.
    """

    def __init__(
        self,
        stepper: Stepper,
        vocabulary: Vocabulary,
        judge: Judge,
        sizes: BatchSizes,
        recipe: Callable[[Picture, Verdict], Recipe | None] = lambda picture, verdict: None,
    ) -> None:
        self.stepper, self.vocabulary, self.judge, self.recipe = stepper, vocabulary, judge, recipe
        self.sizes, self.max_pictures = sizes, sizes.pictures + sizes.late_pictures
        self.judged_at = 0.0, 0.0  # begin and end of the last judging, in seconds since 1970
        self._encoding = ThreadPoolExecutor(THREADS, "png")  # zlib lets other threads run
        self._beside = ThreadPoolExecutor(1, "step")
        self.batch: dict[PictureKey, Member] = {}
        self._drawn: dict[PictureKey, Member] = {}  # their steps are done; the next step judges them
        self._stepping: tuple[list[Member], Callable[[], list[Outcome]]] | None = None
        self._computed = 0  # network rows so far
        self.worked = 0.0  # costs of pictures so far, as forecasts count them (`SamplingOptions.cost`)
        self._failed = list[Outcome]()  # while joining; the next step returns them

    @property
    def room(self) -> int:
        """How many more pictures may join now."""
        return room(len(self.batch), self.sizes.pictures, self.sizes.late_pictures)

    def admit(self, pictures: Sequence[Picture]) -> None:
        """Add pictures to the batch; their first step is its next one."""
        self._failed += end_pictures(self._join, pictures, lambda picture: picture, self.stepper.device)

    def _join(self, pictures: Sequence[Picture]) -> None:
        for picture, row in zip(pictures, new_rows(self.stepper, self.vocabulary, pictures), strict=True):
            self.batch[picture.key] = self._member(picture, row, self._computed)

    def _member(
        self, picture: Picture, row: Row, joined_at: int, before: Sequence[Verdict] = (), best: Drawn | None = None
    ) -> Member:
        member = Member(picture, row, joined_at, self.stepper.picture_shape, before, best)
        member.record()
        return member

    def drop(self, keys: Container[PictureKey]) -> None:
        """Remove pictures; the others are unaffected."""
        self.batch, self._drawn = (
            {key: member for key, member in members.items() if key not in keys} for members in (self.batch, self._drawn)
        )
        self._failed = [failed for failed in self._failed if failed.picture.key not in keys]

    def step(self) -> list[Outcome]:
        """Begin a step, which `wait` ends, and judge the pictures whose steps are done. Return those that ended.

        On a CPU both take place at the same time, because judging alone would leave cores idle.
        """
        self.wait()
        chosen = self._choose()
        take = partial(self._end, lambda members: self.stepper.step([member.row for member in members]), chosen)
        if chosen:
            is_beside = self._drawn and overlaps(self.stepper.device)
            self._stepping = chosen, self._beside.submit(take).result if is_beside else take
        drawn, self._drawn = list(self._drawn.values()), {}
        ended, self._failed = self._failed, list[Outcome]()
        return ended + self._end(self._finish, drawn)

    def wait(self) -> None:
        """End the step that has begun, if there is one."""
        if self._stepping is None:
            return
        (chosen, take), self._stepping = self._stepping, None
        self._failed += self._remove(take())
        stepped = [member for member in chosen if member.picture.key in self.batch]
        self.worked += sum(member.picture.options.cost / len(member.row.table) for member in stepped)
        for member in stepped:
            self._failed += self._remove(self._end(lambda alone: alone[0].record(), [member]))
        for member in stepped:
            if member.row.done and member.picture.key in self.batch:
                self._drawn[member.picture.key] = self.batch.pop(member.picture.key)

    def _choose(self) -> list[Member]:
        """Return the pictures that take the next step."""
        left = {member: member.row.network_rows() for member in self.batch.values()}
        chosen = list(left)
        if self.sizes.efficient_rows is not None:
            pictures = (
                (member.picture.job, Workload(rows[0], sum(rows), member.joined_at)) for member, rows in left.items()
            )
            stepping = set(jobs_to_step(pictures, self._computed, self.sizes.efficient_rows))
            chosen = [member for member in chosen if member.picture.job in stepping]
        self._computed += sum(left[member][0] for member in chosen)
        return chosen

    def _end(
        self, work: Callable[[Sequence[Member]], list[Outcome] | None], members: Sequence[Member]
    ) -> list[Outcome]:
        """Do `work` for the members; return the pictures that end by it."""
        return end_pictures(work, members, lambda member: member.picture, self.stepper.device)

    def _remove(self, ended: list[Outcome]) -> list[Outcome]:
        """Remove pictures that ended from the batch, unless they have been dropped; return those."""
        return [one for one in ended if self.batch.pop(one.picture.key, None) is not None]

    def _finish(self, done: Sequence[Member]) -> list[Outcome]:
        """Judge the pictures whose steps are done. Encode those that end; the others begin their next attempt."""
        images = self.stepper.pictures([member.row for member in done])  # (N, 3, H, W)
        finite = images.flatten(1).sum(1).isfinite()  # one NaN or infinity makes the sum one; sums are fast
        whole = [member for member, is_finite in zip(done, finite.tolist(), strict=True) if is_finite]
        outcomes = list[Outcome](
            Failed(member.picture, "the network's output is not finite") for member in done if member not in whole
        )
        if not whole:
            return outcomes
        if outcomes:
            images = images[finite]
        begun_at = time.time()
        pictures = [member.picture for member in whole]
        places = [places_in(self.stepper, self.vocabulary, member.picture, member.row) for member in whole]
        verdicts = judge_pictures(self.judge, pictures, images, places)
        self.judged_at = begun_at, time.time()
        again, ended = list[Member](), list[tuple[Picture, Drawn]]()
        for member, verdict, pixels in zip(whole, verdicts, to_uint8(images), strict=True):
            picture, so_far = member.picture, (*member.before, verdict)
            best = Drawn(verdict, pixels, member.frames).or_better(member.best)
            if attempt := following(picture, verdict):
                (row,) = new_rows(self.stepper, self.vocabulary, [attempt])
                again.append(self._member(attempt, row, member.joined_at, so_far, best))
                continue
            ended.append((picture, replace(best, verdict=final_verdict(picture, best.verdict, so_far))))
        outcomes += self._encoding.map(lambda one: self._encode(*one), ended)
        self.batch |= {member.picture.key: member for member in again}  # last, because what raises is repeated
        return outcomes

    def _encode(self, picture: Picture, drawn: Drawn) -> FinishedPicture:
        verdict, pixels, recipe = drawn.verdict, drawn.pixels, self.recipe(picture, drawn.verdict)
        png = png_bytes(pixels, recipe.text() if recipe else None)
        if not drawn.frames:
            return FinishedPicture(picture, verdict, png, pixels=pixels)
        trajectory = sheet(np.stack(drawn.frames), columns=len(drawn.frames))
        own = recipe.model_copy(update={"trajectory": picture.trajectory}) if recipe else None
        strip = png_bytes(trajectory, own.text() if own else None)
        return FinishedPicture(picture, verdict, png, strip, pixels)


def stages(n: int, steps: int) -> set[int]:
    """Return the steps after which a trajectory of n stages shows x_t, evenly spread: 0 is the noise."""
    return {round(i * steps / (n - 1)) for i in range(n)}


def frame_size(sampled: Sequence[int], picture: Sequence[int]) -> tuple[int, int]:
    """Return the height and width of x_t (C, h, w) in the proportions of its picture (C, H, W), with no side shorter.

    An upsampler may give a square x_t a picture of other proportions.
    """
    _, h, w = sampled
    _, H, W = picture
    return (round(w * H / W), w) if h * W < w * H else (h, round(h * W / H))
