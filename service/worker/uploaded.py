"""Pictures that were sent to be judged, in the place of those that are made: rows that are done when they begin.

Knows rows, no Redis and no HTTP.
"""

from collections.abc import Sequence

import numpy as np
import torch

from service.contract.records import Picture
from shared.diffusion.denoise import Row
from shared.diffusion.samplers import Table
from shared.evaluator import as_input
from shared.pictures import read_png, to_images

JUDGED_TOGETHER = 32  # pictures of a batch
_NOTHING = torch.empty(0, dtype=torch.float64)
NO_STEPS = Table(_NOTHING.long(), _NOTHING, _NOTHING, _NOTHING, _NOTHING)


def sent_row(picture: Picture, labels: Sequence[float]) -> Row:
    """A picture that was sent, of the size that the evaluator looks at, so that those of any size share a batch."""
    assert picture.png is not None
    x = as_input(to_images(np.stack([read_png(picture.png)])))[0]  # (3, H, W)
    return Row(x, torch.tensor(labels), picture.options, NO_STEPS, torch.Generator())


class Sent:
    """Stands where pictures that are made have a stepper: there is nothing to do."""

    network_rows = padding_rows = 0

    def new_row(self, labels: object, options: object, seed: int, positions: object = None) -> Row:
        raise LookupError("the picture that was sent is no longer there")

    def step(self, rows: Sequence[Row]) -> None:
        assert all(row.done for row in rows)
