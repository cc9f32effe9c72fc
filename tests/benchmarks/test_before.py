"""The comparison with an older commit: its ratios."""

import pytest

from benchmarks.sections import before
from benchmarks.sections.before import STARTS, Served


def served(*rounds: tuple[float, int]) -> list[Served]:
    """Rounds of some seconds with so many answers, which took 1, 2, 3, ... s."""
    return [Served(seconds, [float(i + 1) for i in range(count)]) for seconds, count in rounds]


def measured() -> tuple[
    dict[int, tuple[list[float], list[float]]], dict[int, before.Both], dict[str, tuple[list[float], list[float]]]
]:
    """Two rounds in which this commit is faster."""
    called = {1: ([0.02, 0.03], [0.01, 0.01])}
    seen = {0: (served((10, 5), (10, 5)), served((5, 10), (10, 10))), 2: (served((10, 4)), served((10, 2)))}
    return called, seen, {key: ([4.0, 4.0], [1.0, 3.0]) for key in STARTS}


def test_ratios_are_by_round_above_1_for_faster_calls_and_below_1_for_shorter_times() -> None:
    found = before.figures(*measured())
    assert found["before.call_speedup_1_rows"]["median"] == pytest.approx((2 + 3) / 2)
    assert found["before.requests_0_busy"]["high"] == pytest.approx((10 / 5) / (5 / 10))
    assert found["before.requests_0_busy"]["low"] == pytest.approx((10 / 10) / (5 / 10))
    assert found["before.requests_2_busy"]["median"] == pytest.approx(0.5)
    assert found["before.requests_p95_2_busy"]["median"] == pytest.approx(2 / 4)
    assert found["before.worker_ready"]["median"] == pytest.approx(0.5)
    assert all(found[f"before.{key}"]["n"] == 2 for key in STARTS)
