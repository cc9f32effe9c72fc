"""The capacity model with round numbers, worked out by hand."""

import pytest

from benchmarks.capacity_model import Costs, devices, need

# Pictures of 4 rows take 10 ms, in the service 15 ms.
COSTS = Costs(
    row_s=0.0025,
    other_s=0.005,
    redis_s=0.001,
    redis_bytes=2.0**20,
    picture_bytes=5000,
    rows=4,
    kept_s=3600,
)


@pytest.mark.parametrize(
    ("pictures_per_s", "picture_s", "expected"),
    [(1.0, 0.064, 1), (3.0, 0.2, 1), (3.01, 0.2, 2), (0.0, 0.064, 1), (30.0, 0.2, 10)],
)
def test_devices_do_not_exceed_the_load(pictures_per_s: float, picture_s: float, expected: int) -> None:
    assert devices(pictures_per_s, picture_s, load=0.6) == expected


def test_needs_follow_from_the_costs() -> None:
    assert COSTS.picture_s == pytest.approx(0.015)
    found = need(COSTS, 864_000)  # 10 a second on average, 30 at the peak
    assert found["redis_share"] == pytest.approx(0.03)
    assert found["redis_gib"] == pytest.approx(10 * 3600 / 1024)
    assert found["storage_gib"] == pytest.approx(10 * 3600 * 5000 / 2**30)
    assert found["mbit_per_s"] == pytest.approx(1.2)
