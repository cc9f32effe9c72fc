"""Whether a series grows: the Theil-Sen slope (Sen 1968) and a moving-block bootstrap (Kuensch 1989) of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 400
BLOCK_S = 600.0  # neighbouring samples depend on each other: by the load, and by what expires minutes later
JUDGED_MINUTES = 60.0  # a shorter soak sees the API warm up: it remembers the ends of its last 1,000 jobs
ALLOWED_PER_HOUR = 0.02  # growth, as a share of the series' median


@dataclass(frozen=True)
class Trend:
    """The slope of a series in shares of its median an hour, with the bounds of a 95 % interval."""

    median: float
    slope: float
    low: float
    high: float

    @property
    def is_flat(self) -> bool:
        """Whether growth beyond `ALLOWED_PER_HOUR` is not shown: the interval's lower bound is not above it."""
        return self.low <= ALLOWED_PER_HOUR


def theil_sen(times: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Return the median slope of all pairs."""
    i, j = np.triu_indices(len(times), k=1)
    return float(np.median((values[j] - values[i]) / (times[j] - times[i])))


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Return the trend of samples at `times`, in seconds.

    The bootstrap adds blocks of residuals, drawn with replacement, to the fitted line.
    """
    t, v = np.asarray(times, dtype=float), np.asarray(values, dtype=float)
    slope = theil_sen(t, v)
    line = slope * t + np.median(v - slope * t)
    residuals = v - line
    block = min(len(t), max(1, round(BLOCK_S / float(np.median(np.diff(t))))))
    dice = np.random.default_rng(0)
    slopes = []
    for _ in range(RESAMPLES):
        starts = dice.integers(0, len(t) - block + 1, size=-(-len(t) // block))
        drawn = np.concatenate([residuals[at : at + block] for at in starts])[: len(t)]
        slopes.append(theil_sen(t, line + drawn))
    low, high = np.percentile(slopes, [2.5, 97.5])
    median = float(np.median(v))
    share = 3600 / median if median else 0.0
    return Trend(median, slope * share, float(low) * share, float(high) * share)
