"""Poisson arrivals and batching policies on a virtual clock, with latencies worked out by hand."""

import pytest
import torch

from benchmarks.batching import (
    Arrival,
    Policy,
    StepCost,
    continuous,
    mean_network_rows,
    one_at_a_time,
    poisson,
    request_level,
    simulate,
)

FLAT = StepCost({1: 1.0, 1000: 1.0})  # every step takes 1 s


def arrival(at: float, pictures: int, steps: int = 4) -> Arrival:
    return Arrival(at, pictures, steps, rows=2)


def test_poisson_arrivals_have_the_rate_and_exponential_gaps() -> None:
    arrivals = poisson(rate=5.0, count=20_000, seed=3)
    gaps = torch.tensor([0.0] + [a.at for a in arrivals]).double().diff()
    assert gaps.mean().item() == pytest.approx(0.2, rel=0.03)
    assert gaps.std().item() == pytest.approx(0.2, rel=0.03)  # an exponential's deviation is its mean
    assert (gaps > 0.2).double().mean().item() == pytest.approx(0.3679, abs=0.02)
    rows = sum(a.network_rows for a in arrivals) / len(arrivals)
    assert rows == pytest.approx(mean_network_rows(), rel=0.03)


def test_another_rate_gives_the_same_requests_at_other_times() -> None:
    slow, fast = poisson(1.0, 50, seed=9), poisson(4.0, 50, seed=9)
    assert [a.network_rows for a in slow] == [a.network_rows for a in fast]
    assert [a.at for a in fast] == pytest.approx([a.at / 4 for a in slow])


def test_continuous_batching_lets_a_request_join_at_the_next_step() -> None:
    served = simulate(continuous, [arrival(0.0, 2, steps=4), arrival(1.5, 2, steps=2)], FLAT, max_pictures=8)
    assert served.latencies == [4.0, 2.5]  # arrives during the second step, runs in the third and fourth
    assert served.ended_at == 4.0


def test_request_level_batching_waits_for_the_batch_to_end() -> None:
    arrivals = [arrival(0.0, 2, steps=4), arrival(0.0, 1, steps=2), arrival(1.5, 2, steps=2)]
    served = simulate(request_level, arrivals, FLAT, max_pictures=8)
    assert served.latencies == [4.0, 4.0, 4.5]  # the short one is answered with its batch; the late one is in the next


def test_request_level_batching_takes_whole_requests_only() -> None:
    arrivals = [arrival(0.0, 3, steps=1), arrival(0.0, 3, steps=1), arrival(0.0, 1, steps=1)]
    assert simulate(request_level, arrivals, FLAT, max_pictures=4).latencies == [1.0, 2.0, 2.0]
    assert simulate(continuous, arrivals, FLAT, max_pictures=4).latencies == [1.0, 2.0, 2.0]
    assert simulate(request_level, [arrival(0.0, 9, steps=1)], FLAT, max_pictures=4).latencies == [1.0]


def test_one_at_a_time_samples_one_picture_after_the_other() -> None:
    served = simulate(one_at_a_time, [arrival(0.0, 3, steps=2), arrival(1.0, 1, steps=2)], FLAT, max_pictures=8)
    assert served.latencies == [6.0, 7.0]


@pytest.mark.parametrize("policy", [continuous, request_level, one_at_a_time])
def test_every_policy_computes_every_network_row(policy: Policy) -> None:
    arrivals = poisson(2.0, 60, seed=5)
    linear = StepCost({1: 1.0, 1000: 1000.0})  # seconds = rows, so the total does not depend on batching
    served = simulate(policy, [Arrival(0.0, a.pictures, a.steps, a.rows) for a in arrivals], linear, max_pictures=16)
    assert served.ended_at == pytest.approx(sum(a.network_rows for a in arrivals))


def test_step_costs_are_linear_between_measured_sizes() -> None:
    cost = StepCost({2: 1.0, 4: 3.0, 8: 4.0})
    assert [cost(n) for n in (1, 2, 3, 4, 6, 8, 12)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0]


def test_a_large_request_waits_for_small_ones_in_continuous_batching() -> None:
    arrivals = [arrival(0.0, 8, steps=8), arrival(1.5, 1, steps=2)]
    linear = lambda rows: float(rows)  # noqa: E731
    assert simulate(continuous, arrivals, linear, max_pictures=16).latencies == [132.0, 50.5]
    assert simulate(continuous, arrivals, linear, max_pictures=16, few=1).latencies == [132.0, 18.5]
