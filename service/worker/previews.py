"""Publishes the progress of pictures to clients that watch their jobs: steps, and small previews of x0_hat as PNGs.

Computes nothing for a job that nobody watches. Knows rows and Redis, no HTTP.
"""

import base64
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from redis import Redis
from torch import Tensor

from service.contract.records import Picture
from service.store import keys
from service.store.connection import best_effort
from shared.diffusion.denoise import Row
from shared.pictures import png_bytes, resized, to_uint8

PREVIEWS_AT_ONCE = 16  # of all jobs together; the rest of a larger batch follows the next time
PREVIEW_SIDE = 64  # pixels at most
InProgress = tuple[Picture, Row, tuple[int, int, int]]  # with the shape (C, H, W) of the finished picture


class Previews:
    """One worker's reports on its pictures, at most every `every_s` seconds."""

    def __init__(self, connection: Redis, every_s: float) -> None:
        self.connection, self.every_s = connection, every_s
        self._published_at = 0.0
        self._next = 0  # index of the first picture to render next time

    def publish(self, rows: Sequence[InProgress]) -> None:
        """Report the steps of `rows` to those who watch their jobs, unless the last report was just now."""
        if not rows or time.monotonic() - self._published_at < self.every_s:
            return
        self._published_at = time.monotonic()
        job_ids = list({picture.job for picture, *_ in rows})
        found = self.connection.mget([keys.watched(job_id) for job_id in job_ids])
        watched = {job_id for job_id, watch in zip(job_ids, found, strict=True) if watch is not None}
        rows = [one for one in rows if one[0].job in watched and one[1].x0_hat is not None]
        if not rows:
            return
        previews = self._previews(rows)
        reports = defaultdict[str, list[dict[str, Any]]](list)
        for picture, row, _ in rows:
            report = {"index": picture.index, "step": row.step, "steps": len(row.table)}
            preview = {"preview": previews[picture.key]} if picture.key in previews else {}
            reports[picture.job].append({**report, **preview})
        with best_effort(), self.connection.pipeline(transaction=False) as pipe:
            for job_id, pictures in reports.items():
                pipe.publish(keys.PREVIEWS, f"{job_id} {json.dumps(pictures)}")
            pipe.execute()

    def _previews(self, rows: Sequence[InProgress]) -> dict[tuple[str, int], str]:
        """Render the next PREVIEWS_AT_ONCE pictures as data URLs."""
        start = self._next % len(rows)
        chosen = (list(rows[start:]) + list(rows[:start]))[:PREVIEWS_AT_ONCE]
        self._next = start + len(chosen)
        return {picture.key: _preview(row.x0_hat, shape) for picture, row, shape in chosen if row.x0_hat is not None}


def _preview(x0_hat: Tensor, shape: tuple[int, int, int]) -> str:
    """Return x0_hat (3, h, w) as the data URL of a PNG in the proportions of its picture, whose `shape` is (3, H, W).

    No side has more than PREVIEW_SIDE pixels.
    """
    _, height, width = shape
    scale = min(1.0, PREVIEW_SIDE / max(height, width))
    (small,) = to_uint8(resized(x0_hat[None], (max(1, round(scale * height)), max(1, round(scale * width)))))
    return "data:image/png;base64," + base64.b64encode(png_bytes(small)).decode()
