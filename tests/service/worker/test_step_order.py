"""Who steps: small jobs before large ones that would hold them up, nobody waits for ever, and all where it is free."""

import pytest

from service.worker.step_order import HOLDS_UP, PATIENCE, Standing, of_jobs, whose_turn


def job(now: int, left: int, since: int = 0) -> Standing:
    return Standing(now, left, since)


def test_a_job_stands_as_its_pictures_do_together() -> None:
    pictures = [("a", job(2, 8, since=5)), ("b", job(4, 16, since=3)), ("a", job(1, 6, since=7)), ("a", job(1, 3))]
    assert of_jobs(pictures) == {"a": job(4, 17, since=7), "b": job(4, 16, since=3)}


def test_small_jobs_go_first_and_a_large_one_waits() -> None:
    jobs = {"large": job(16, 256), "small": job(4, 16), "middle": job(8, 40)}
    assert whose_turn(jobs, made=0, few=12) == ["small", "middle"]
    assert whose_turn(jobs, made=0, few=13) == ["small", "middle", "large"]  # the device has room for it


def test_jobs_that_hold_up_nobody_step_together() -> None:
    alike = {str(i): job(1, 4) for i in range(32)}
    assert whose_turn(alike, made=0, few=8) == list(alike)
    almost = {"a": job(8, 40), "b": job(8, 40), "c": job(8, int(HOLDS_UP * 80)), "d": job(8, int(HOLDS_UP * 120) + 1)}
    assert whose_turn(almost, made=0, few=16) == ["a", "b", "c"]
    assert whose_turn({"a": job(16, 64), "b": job(16, 64)}, made=0, few=16) == ["a"]  # twice as long for both, else


def test_one_job_steps_whatever_its_size() -> None:
    assert whose_turn({"a": job(64, 1024)}, made=0, few=1) == ["a"]
    assert whose_turn({}, made=0, few=1) == []


@pytest.mark.parametrize("small", [4, 16, 40])
def test_a_large_job_waits_for_no_more_than_its_patience(small: int) -> None:
    """One small job after the other comes; the large one has its turn once so many rows were made since it came."""
    made, large = 0, job(16, 256)
    while whose_turn({"small": job(4, small, since=made), "large": large}, made, few=4)[0] == "small":
        made += 4
    assert made * PATIENCE == pytest.approx(256 - small, abs=5 * PATIENCE)
