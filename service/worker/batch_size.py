"""How many pictures a worker samples at the same time, by its device."""

from dataclasses import dataclass
from typing import Final

import torch

from service.settings import Settings


@dataclass(frozen=True)
class BatchSizes:
    pictures: int  # of a batch
    rows: int  # largest network call
    efficient_rows: int | None = None  # from which large jobs wait for small ones; None: all pictures step together
    late_pictures: int = 0  # that may join beyond `pictures`, a few at each step


# Rows/s hardly grow beyond 8 rows, so that larger batches only make each step longer (docs/decisions.md).
ON_CPU: Final = BatchSizes(pictures=16, rows=64, efficient_rows=8, late_pictures=16)
ON_GPU: Final = BatchSizes(pictures=64, rows=256, efficient_rows=64, late_pictures=64)  # not measured


def choose(settings: Settings, device: torch.device) -> BatchSizes:
    """Return the device's sizes, with those that are set in their place."""
    default = ON_CPU if device.type == "cpu" else ON_GPU
    rows = settings.batch_rows or default.rows
    if settings.batch_pictures is not None:
        return BatchSizes(settings.batch_pictures, rows)
    return BatchSizes(default.pictures, rows, default.efficient_rows, default.late_pictures)
