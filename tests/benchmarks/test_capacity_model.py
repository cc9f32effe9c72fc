"""The capacity model with round numbers, worked out by hand."""

import pytest

from benchmarks import capacity_model
from benchmarks.batching import POLICIES, StepCost, simulate, within
from benchmarks.capacity_model import Costs
from benchmarks.sections.load import summary

# Pictures of 4 rows take 10 ms, in the service 15 ms; a step takes 10 ms per row.
COSTS = Costs(
    row_s=0.0025,
    other_s=0.005,
    step=StepCost({1: 0.01, 32: 0.32}),
    max_pictures=16,
    redis_bytes=2.0**20,
    redis_commands=100.0,
    redis_commands_per_s=100_000.0,
    picture_bytes=5000,
    served=(1, 1, 2),
    kept_s=3600,
)


@pytest.mark.parametrize(
    ("pictures_per_s", "picture_s", "expected"),
    [(1.0, 0.064, 1), (3.0, 0.2, 1), (3.01, 0.2, 2), (0.0, 0.064, 1), (30.0, 0.2, 10)],
)
def test_devices_do_not_exceed_the_load(pictures_per_s: float, picture_s: float, expected: int) -> None:
    assert capacity_model.devices(pictures_per_s, picture_s, load=0.6) == expected


def test_needs_and_bottlenecks_follow_from_the_costs() -> None:
    assert COSTS.picture_s(4) == pytest.approx(0.015)
    assert COSTS.picture_s(32) == pytest.approx(0.085)
    assert capacity_model.alone_s(COSTS, (1, 2, 2)) == pytest.approx(0.05)
    need = capacity_model.redis_need(COSTS, 864_000)  # 10 a second on average, 30 at the peak
    assert need["memory_gib"] == pytest.approx(30 * 3600 / 1024)
    assert need["storage_gib"] == pytest.approx(30 * 3600 * 5000 / 2**30)
    assert need["commands_per_s"] == pytest.approx(3000)
    assert need["commands_share"] == pytest.approx(0.03)
    assert need["mbit_per_s"] == pytest.approx(1.2)
    few, many = (capacity_model.first_to_break(COSTS, 864_000, rows) for rows in (8, 40_000))
    assert few.startswith("the bottleneck is Redis memory (of 4 GiB), at 26 times its capacity")
    assert many.startswith("the bottleneck is the device, at 3e+03 times its capacity")


def test_a_load_test_with_the_models_step_costs_agrees_with_it() -> None:
    rounds = {"continuous": 2, "request-level": 2, "one at a time": 1}
    latencies = {
        name: [
            latency
            for seed in range(rounds[name])
            for latency in simulate(policy, within(10.0, 0.6, seed), COSTS.step, 16).latencies
        ]
        for name, policy in POLICIES.items()
    }
    load = {"latencies": {"0.6": {name: summary(found) for name, found in latencies.items()}}}
    load |= {"spans_s": {"0.6": 10.0}, "requests_per_s": 1.0, "max_pictures": 16, "few": None, "late": 0}
    simulated = capacity_model.the_same_requests(load, COSTS.step)
    assert [len(found) for found in simulated["0.6"].values()] == [12, 12, 6]
    assert capacity_model.check(load, simulated).count("1.00 to 1.00 times") == 2
