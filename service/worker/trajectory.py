"""Keeps the stages of a picture from noise to the end while it is sampled; side by side they are its trajectory.

Knows rows and pictures, no Redis. A picture that starts again, here or in another worker, starts a new trajectory.
"""

import numpy as np
from numpy.typing import NDArray

from service.contract.records import Picture
from shared.diffusion.denoise import Row
from shared.pictures import sheet, to_uint8

Key = tuple[str, int]


def stages(n: int, steps: int) -> set[int]:
    """Return the steps after which a trajectory of n stages shows x_t, evenly spread: 0 is the noise."""
    return {round(i * steps / (n - 1)) for i in range(n)}


class Trajectories:
    """The trajectories of the pictures in one batch that asked for one."""

    def __init__(self) -> None:
        self._frames: dict[Key, list[NDArray[np.uint8]]] = {}

    def begin(self, picture: Picture, row: Row) -> None:
        """Keep the first stage, before the first step."""
        if picture.trajectory is not None:
            self._frames[picture.key] = [_frame(row)]

    def record(self, picture: Picture, row: Row) -> None:
        """Keep the row as it is after a step, if that step is a stage."""
        if picture.trajectory is not None and row.step in stages(picture.trajectory, len(row.table)):
            self._frames[picture.key].append(_frame(row))

    def forget(self, picture: Picture) -> None:
        self._frames.pop(picture.key, None)

    def image(self, picture: Picture) -> NDArray[np.uint8] | None:
        """Return the stages side by side (h, w, 3), x_t clipped to [-1, 1]; None if the picture asked for none."""
        frames = self._frames.get(picture.key)
        return None if frames is None else sheet(np.stack(frames), columns=len(frames))


def _frame(row: Row) -> NDArray[np.uint8]:
    frame: NDArray[np.uint8] = to_uint8(row.x[None])[0]  # (H, W, 3); a copy, because row.x is a view of the batch
    return frame
