"""A finished job's scores, and the grid of its best pictures. Knows neither Redis nor storage."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from service.contract import recipe
from service.contract.recipe import MadeWith
from service.contract.records import FinishedPicture, JobRecord, JobResult, Scores, Verdict, breakdown
from shared.pictures import marked_grid, png_bytes, read_png, sheet

WORST = 20  # pictures of a score that its result shows besides

Pixels = NDArray[np.uint8]  # (H, W, 3), or (n, H, W, 3)


def results_alone(finished: Iterable[FinishedPicture]) -> dict[tuple[str, int], JobResult]:
    """Return the results of jobs that have no other picture, as far as one can see: sampled pictures of index 0."""
    firsts = [one for one in finished if one.picture.index == 0 and one.picture.run_seed is not None]
    return {one.picture.key: score([one.verdict], 1) for one in firsts}


def score(verdicts: Sequence[Verdict], n: int) -> JobResult:
    """Score each repeat of n pictures as `trainer score` does. The best has the highest accuracy, then exact match."""
    repeats = []
    for first in range(0, len(verdicts), n):
        part = verdicts[first : first + n]
        asked = [len(set(verdict.labels)) for verdict in part]
        hits = sum(round(verdict.accuracy * k) for verdict, k in zip(part, asked, strict=True))
        exact = sum(verdict.exact for verdict in part)
        f1 = sum(verdict.f1 for verdict in part)
        repeats.append(Scores(accuracy=hits / sum(asked), exact_match=exact / n, f1=f1 / n))
    best = max(range(len(repeats)), key=lambda r: (repeats[r].accuracy, repeats[r].exact_match, -r))
    wrong = [one for one in verdicts if not one.exact]
    worst = [one.index for one in sorted(wrong, key=lambda one: (one.f1, one.accuracy, one.index))[:WORST]]
    return JobResult(repeats=repeats, best=best, worst=worst, **breakdown(verdicts))


def decoded(png: bytes) -> Pixels:
    try:
        return read_png(png)
    except OSError as error:  # Pillow's, not of storage, which would be tried again
        raise ValueError(f"a picture is damaged: {error}") from error


def compose(
    record: JobRecord,
    result: JobResult,
    verdicts: Sequence[Verdict],
    judged_by: MadeWith | None,
    pictures: Pixels,
) -> bytes:
    """Return the PNG of the best repeat's `pictures` (n, H, W, 3). Uploaded ones are marked as right or wrong."""
    shown = [verdicts[index] for index in result.best_indices(record)]
    columns = min(record.columns, len(shown))
    if record.sent:
        return png_bytes(marked_grid(pictures, [verdict.exact for verdict in shown], columns))
    made_with = recipe.of_grid(record, result.best, shown, judged_by)
    return png_bytes(sheet(pictures, columns), made_with.text())
