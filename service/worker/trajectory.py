"""Strips: the stages of a picture from noise to the end, kept while it is sampled.

Knows rows and pictures, no Redis. A picture that begins anew, here or in another worker, begins its strip anew.
"""

import numpy as np
from numpy.typing import NDArray

from service.contract.records import Picture
from shared.diffusion.denoise import Row
from shared.pictures import sheet, to_uint8

Key = tuple[str, int]


def stages(n: int, steps: int) -> set[int]:
    """The steps after which a strip of n stages shows x_t, evenly spread: 0 is the noise, `steps` the picture."""
    return {round(i * steps / (n - 1)) for i in range(n)}


class Strips:
    """The strips of the pictures of one batch, of those that were asked for with a trajectory."""

    def __init__(self) -> None:
        self._frames: dict[Key, list[NDArray[np.uint8]]] = {}

    def begin(self, picture: Picture, row: Row) -> None:
        """A picture's first stage, before its first step."""
        if picture.trajectory is not None:
            self._frames[picture.key] = [_frame(row)]

    def look(self, picture: Picture, row: Row) -> None:
        """Keeps a row as it is after a step, if that is a stage of its picture."""
        if picture.trajectory is not None and row.step in stages(picture.trajectory, len(row.table)):
            self._frames[picture.key].append(_frame(row))

    def forget(self, picture: Picture) -> None:
        self._frames.pop(picture.key, None)

    def strip(self, picture: Picture) -> NDArray[np.uint8] | None:
        """A finished picture's stages side by side (h, w, 3), x_t clipped to [-1, 1]; None if it was not asked for."""
        frames = self._frames.get(picture.key)
        return None if frames is None else sheet(np.stack(frames), columns=len(frames))


def _frame(row: Row) -> NDArray[np.uint8]:
    frame: NDArray[np.uint8] = to_uint8(row.x[None])[0]  # (H, W, 3); a copy, for row.x is a part of the batch's tensor
    return frame
