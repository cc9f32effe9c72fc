"""How to time things fairly on a shared machine: work that takes turns, ratios by round, and a deadline."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from scipy import stats

from benchmarks.results import Data

CONFIDENCE = 0.95
STEADY = 0.15  # the most that the machine's speed may change while a section measures


def figure(values: Iterable[float]) -> Data:
    """Summarise repeated measurements: median, spread (highest minus lowest), lowest, highest and their number."""
    found = list(values)
    low, high = min(found), max(found)
    return {"median": statistics.median(found), "spread": high - low, "low": low, "high": high, "n": len(found)}


def percentile(values: Sequence[float], q: float) -> float:
    """Return the smallest value that at least the fraction `q` of all values does not exceed. ValueError if empty."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(0, -(-round(q * 1e6) * len(ordered) // 10**6) - 1)]


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Deadline:
    """A time limit of `limit_s`, which starts when it is created."""

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self._now, self._start = limit_s, now, now()

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return self._now() - self._start

    def allows(self, expected_s: float) -> bool:
        """Whether something that takes `expected_s` would end in time."""
        return self.spent + expected_s <= self.limit_s

    def rounds(self, count: int, *, at_least: int = 1, expected_s: float = 0.0) -> Iterator[int]:
        """Yield up to `count` round numbers; stop where a round as long as the longest so far would end too late.

        `expected_s`: the expected length of the first round.
        """
        longest = expected_s
        for number in range(count):
            if number >= at_least and not self.allows(longest):
                return
            begun = self.spent
            yield number
            longest = max(longest, self.spent - begun)


def in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, *, deadline: Deadline | None = None
) -> dict[str, list[float]]:
    """Return the seconds of each work in each round. They take turns, so that a slow minute slows all of them.

    One extra round warms up. A `deadline` may end the rounds early; if there was time for one only, it counts.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in deadline.rounds(rounds + 1) if deadline else range(rounds + 1):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: taken[1:] or taken for name, taken in times.items()}


def order(turn: int) -> list[int]:
    """Return the places of two that take turns, in another order in each round."""
    return [0, 1] if turn % 2 == 0 else [1, 0]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return above / below, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def paired(above: Sequence[float], below: Sequence[float]) -> Data:
    """Summarise above / below round by round, with the confidence interval of the ratio's geometric mean."""
    found = ratios(above, below)
    return {**figure(found), "interval": interval(found)}


def pooled_p95(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Data:
    """Return the ratio of two p95s over the latencies of all rounds: a round has too few for a p95 of its own.

    Its spread covers the ratios with each one of the rounds left out, its interval is that of the rounds' own ratios.
    """

    def ratio(left_out: int | None) -> float:
        a, b = ([x for i, one in enumerate(runs) if i != left_out for x in one] for runs in (above, below))
        return percentile(a, 0.95) / percentile(b, 0.95)

    whole, others = ratio(None), [ratio(i) for i in range(len(above))] if len(above) > 1 else []
    by_round = ratios([percentile(one, 0.95) for one in above], [percentile(one, 0.95) for one in below])
    return {**figure([whole, *others]), "median": whole, "n": len(above), "interval": interval(by_round)}


def interval(found: Sequence[float]) -> tuple[float, float] | None:
    """Return the confidence interval of the geometric mean: Student's t of the logarithms. None for a single round."""
    if len(found) < 2:
        return None
    logs = [math.log(one) for one in found]
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return math.exp(mean - half), math.exp(mean + half)


def change(rates: Sequence[float]) -> float:
    """Return by which share the machine's speed changed while a section measured, if by more than STEADY; else 0."""
    share = max(rates) / min(rates) - 1
    return share if share > STEADY else 0.0
