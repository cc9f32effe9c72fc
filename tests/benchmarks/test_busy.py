"""Processes that keep the machine busy: there while something is measured, and gone afterwards."""

import time

import psutil
import pytest

from benchmarks import busy as module
from benchmarks.busy import busy


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "time.monotonic() < end" in " ".join(one.cmdline())]


def test_they_compute_until_the_measurement_ends() -> None:
    with busy(2):
        found = children()
        assert len(found) == 2
        limit = time.monotonic() + 60
        while min(sum(one.cpu_times()[:2]) for one in found) < 0.05:
            assert time.monotonic() < limit
            time.sleep(0.05)
    assert not any(one.is_running() for one in found)


def test_they_end_with_a_failing_measurement() -> None:
    with pytest.raises(ValueError, match="failed"), busy(1):
        raise ValueError("failed")
    assert children() == []


def until_one_ends(before: list[psutil.Process]) -> None:
    (process,) = [one for one in psutil.Process().children() if one not in before]
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def test_one_that_ended_too_soon_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAM", "")
    before = psutil.Process().children()
    with pytest.raises(RuntimeError, match="1 of 1 busy processes ended"), busy(1):
        until_one_ends(before)
