"""Judges pictures that clients have uploaded, as `engine.py` samples others. Knows no Redis."""

import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract.records import FinishedPicture, Picture
from service.telemetry.boundary import attempt
from service.worker.attempts import judge_pictures
from service.worker.job_files import JobFiles, read_pixels
from shared.device import lost
from shared.evaluator import Judge, as_input
from shared.pictures import to_images

T = TypeVar("T")

JUDGED_TOGETHER = 32  # uploaded pictures of any jobs
READ_WAIT_S = 0.02  # for uploaded pictures, before others get their turn


@dataclass(frozen=True)
class Failed:
    """A picture that cannot be sampled or judged, and why."""

    picture: Picture
    reason: str


Outcome = FinishedPicture | Failed
PictureKey = tuple[str, int]
Read = tuple[Picture, "Future[NDArray[np.uint8]]"]


def end_pictures(
    work: Callable[[Sequence[T]], Sequence[Outcome] | None],
    items: Sequence[T],
    picture_of: Callable[[T], Picture],
    device: torch.device,
) -> list[Outcome]:
    """Do `work`, which returns the pictures that it ends, as `attempt` does; one that fails alone is given up.

    Raises an error only if the device itself has failed.
    """

    def about(item: T) -> dict[str, Any]:
        return {"job_id": picture_of(item).job, "picture": picture_of(item).index}

    def give_up(item: T, reason: str) -> Outcome:
        return Failed(picture_of(item), reason)

    return attempt(work, items, give_up, about, partial(lost, device=device))


class Uploads:
    """Uploaded pictures of one evaluator: they are read from storage in threads, and judged together.

    A `PictureEngine` of `models.py`. Pictures are judged before others are claimed.
    """

    max_pictures = JUDGED_TOGETHER

    def __init__(self, judge: Judge, files: JobFiles, device: torch.device) -> None:
        self.judge, self.files, self.device = judge, files, device
        self.judged_at = 0.0, 0.0  # begin and end of the last judging, in seconds since 1970
        self._reads: dict[PictureKey, Read] = {}

    @property
    def room(self) -> int:
        return self.max_pictures - len(self._reads)

    def admit(self, pictures: Sequence[Picture]) -> None:
        self._reads |= {picture.key: (picture, Future()) for picture in pictures}  # from now on they are wanted
        for picture in pictures:
            self._reads[picture.key] = picture, self.files.start(self._read(picture))

    def drop(self, keys: Container[PictureKey]) -> None:
        self._reads = {key: read for key, read in self._reads.items() if key not in keys}

    async def _read(self, picture: Picture) -> NDArray[np.uint8]:
        """Return a picture's pixels (H, W, 3). No torch: a thread in it while Python ends is an abort."""
        call = partial(read_pixels, self.files.files, *picture.key)
        (pixels,) = await self.files.all({"": call}, lambda: picture.key in self._reads)
        return pixels

    def wait(self) -> None:
        """Wait a moment for pictures to be read."""
        wait([read for _, read in self._reads.values()], READ_WAIT_S)

    def step(self) -> list[Outcome]:
        """Judge the pictures that have been read. Raises an error only if the device itself has failed."""
        done = [one for one in self._reads.values() if one[1].done()]
        begun_at = time.time()
        outcomes = end_pictures(self._judge, done, lambda one: one[0], self.device)
        self.judged_at = begun_at, time.time()
        for picture, _ in done:
            del self._reads[picture.key]
        return outcomes

    def _judge(self, done: Sequence[Read]) -> list[Outcome]:
        images = torch.cat([as_input(to_images(np.stack([read.result()]))) for _, read in done])
        pictures = [picture for picture, _ in done]
        verdicts = judge_pictures(self.judge, pictures, images)
        return [FinishedPicture(picture, verdict, png=b"") for picture, verdict in zip(pictures, verdicts, strict=True)]
