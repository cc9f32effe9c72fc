"""The profiled worker: every function that it times exists, and a part's time excludes the parts that it calls."""

import itertools

import pytest

from benchmarks import worker_profile


def test_every_timed_function_exists() -> None:
    assert all(callable(getattr(owner, name)) for _, owner, name in worker_profile.PARTS)


def test_a_parts_time_excludes_the_parts_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(worker_profile, "CLOCKS", {"wall": lambda: float(next(ticks) ** 2)})  # 0, 1, 4, 9
    inner = worker_profile.timed("inner", lambda: None)
    worker_profile.timed("outer", inner)()
    seconds = {
        sample.labels["part"]: sample.value
        for sample in next(iter(worker_profile.SECONDS.collect())).samples
        if sample.name.endswith("_total") and sample.labels["clock"] == "wall"
    }
    assert seconds == {"inner": 4 - 1, "outer": 9 - 0 - 3}
