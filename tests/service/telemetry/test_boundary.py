"""An exception that nobody foresaw ends one unit, with a reason, a traceback in the log and a count."""

from collections.abc import Sequence
from typing import Any

import pytest

from service.telemetry.boundary import attempt, confined, reason_of, start_vital
from service.telemetry.metrics import UNFORESEEN


def count(unit: str) -> float:
    return UNFORESEEN.labels(unit)._value.get()


def test_a_unit_that_raises_is_given_up_with_a_reason_and_the_next_one_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, reasons, done = count("job"), list[str](), list[int]()
    for number in range(3):
        with confined("job", reasons.append, job_id=number):
            if number == 1:
                raise KeyError("x")
            done.append(number)
    assert (done, reasons, count("job") - before) == ([0, 2], ["KeyError: 'x'"], 1)
    (record,) = caplog.records
    assert record.exc_info is not None


def test_what_concerns_every_unit_is_raised_again() -> None:
    with pytest.raises(KeyError), confined("job", pytest.fail, lambda error: isinstance(error, KeyError)):
        raise KeyError("x")


def test_the_same_unit_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        with confined("periodic task", task="of this test"):
            raise KeyError("x")
    assert len(caplog.records) == 1


def test_a_reason_names_no_path_and_has_one_line() -> None:
    error = PermissionError(13, "Permission denied", "/secret/folder")
    error.add_note("picture 3")
    assert reason_of(error) == "picture 3: PermissionError: Permission denied"
    assert reason_of(ValueError("first\nsecond")) == "ValueError: first"
    assert reason_of(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("bad", [[], [3], [0, 7]])
def test_of_many_that_fail_together_only_those_that_fail_alone_are_given_up(bad: list[int]) -> None:
    def work(items: Sequence[int]) -> list[Any]:
        if set(items) & set(bad):
            raise ValueError(f"not {bad}")
        return list(items)

    found = attempt(work, range(8), lambda item, reason: (item, reason), lambda item: {"job_id": item}, lambda _: False)
    assert found == [(item, f"ValueError: not {bad}") if item in bad else item for item in range(8)]


@pytest.mark.parametrize(("error", "statuses"), [(None, []), (OverflowError(), [1]), (SystemExit(), [1])])
def test_a_process_ends_with_a_thread_that_it_needs(
    error: BaseException | None, statuses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = list[int]()
    monkeypatch.setattr("service.telemetry.boundary.end_process", ended.append)

    def run() -> None:
        if error is not None:
            raise error

    start_vital("heartbeat", run).join()
    assert ended == statuses
