"""A picture's trajectory: its stages from noise to the end, side by side."""

import numpy as np
from numpy.typing import NDArray

from shared.diffusion.denoise import Row
from shared.pictures import to_uint8


def stages(n: int, steps: int) -> set[int]:
    """Return the steps after which a trajectory of n stages shows x_t, evenly spread: 0 is the noise."""
    return {round(i * steps / (n - 1)) for i in range(n)}


def frame(row: Row) -> NDArray[np.uint8]:
    """Return x_t, clipped to [-1, 1], as it is now (H, W, 3). A copy, because `row.x` is a view of the batch."""
    pixels: NDArray[np.uint8] = to_uint8(row.x[None])[0]
    return pixels
