"""Medians, percentiles, taking turns and deadlines, with exact numbers. Nothing is timed."""

import math
from collections.abc import Callable

import pytest

from benchmarks.sections import training
from benchmarks.timing import Deadline, figure, in_turn, interval, paired, percentile, pooled_p95, ratios


def test_a_figure_has_median_and_spread() -> None:
    assert figure([3.0, 1.0, 2.5]) == {"median": 2.5, "spread": 2.0, "low": 1.0, "high": 3.0, "n": 3}


def test_a_ratio_has_a_confidence_interval_of_its_rounds() -> None:
    """Logarithms -1, 0 and 1 (base e): their standard error is 1 / sqrt(3), and t(0.975, 2) is 4.3027."""
    found = paired([math.exp(-1), 1.0, math.exp(1)], [1.0, 1.0, 1.0])
    assert found["median"] == 1.0
    assert [math.log(end) for end in found["interval"]] == pytest.approx([-4.3027 / 3**0.5, 4.3027 / 3**0.5], rel=1e-4)
    assert interval([2.0]) is None
    assert interval([2.0, 2.0]) == (pytest.approx(2.0), pytest.approx(2.0))


@pytest.mark.parametrize(("q", "expected"), [(0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentiles_are_values_that_occurred(q: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), q) == expected


def test_works_take_turns_after_a_warm_up_round() -> None:
    order: list[str] = []
    times = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


def test_the_only_round_that_there_is_time_for_counts() -> None:
    times = in_turn({"a": lambda: None, "b": lambda: None}, rounds=2, deadline=Deadline(0.0))
    assert {name: len(taken) for name, taken in times.items()} == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("limit_s", "at_least", "expected_s", "rounds"),
    [(100, 1, 0, 5), (35, 1, 0, 3), (5, 1, 0, 1), (5, 2, 0, 2), (25, 0, 10, 2), (5, 0, 10, 0)],
)
def test_rounds_end_before_the_deadline(limit_s: float, at_least: int, expected_s: float, rounds: int) -> None:
    """Five rounds are requested, of 10 s each."""
    time_s = 1000.0
    deadline = Deadline(limit_s, now=lambda: time_s)
    found = []
    for number in deadline.rounds(5, at_least=at_least, expected_s=expected_s):
        found.append(number)
        time_s += 10
    assert found == list(range(rounds))
    assert deadline.spent == 10 * rounds


def test_the_time_of_a_step_leaves_out_the_first_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    time_s = 0.0
    monkeypatch.setattr(training.time, "perf_counter", lambda: time_s)

    def loop(on_step: Callable[[], None]) -> None:
        nonlocal time_s
        for taken in (100.0, 2.0, 4.0):  # the first includes the set-up
            time_s += taken
            on_step()
        time_s += 50

    assert training.step_seconds(loop) == 3.0


def test_p95_over_all_rounds_and_its_spread_leaves_each_out() -> None:
    above, below = ([[1.0] * 9 + [last] for last in worst] for worst in ((2.0, 4.0), (5.0, 8.0)))
    found = pooled_p95(above, below)
    assert found["median"] == pytest.approx(2.0 / 5.0)  # the 19th of 20
    assert (found["low"], found["high"], found["n"]) == (2.0 / 5.0, 4.0 / 8.0, 2)
    assert found["interval"] == interval([2.0 / 5.0, 4.0 / 8.0])
