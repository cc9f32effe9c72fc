"""Which jobs take part in the next step of a batch, and how many pictures join it."""

import pytest

from service.worker.step_order import AGING, DELAY_LIMIT, Workload, jobs_to_step, room


def job(next_step: int, left: int, joined_at: int = 0) -> Workload:
    return Workload(next_step, left, joined_at)


def test_a_job_is_as_large_as_its_pictures_together_and_as_old_as_the_last() -> None:
    pictures = [("a", job(2, 8)), ("b", job(4, 15)), ("a", job(2, 8))]
    assert jobs_to_step(pictures, computed=0, efficient_rows=4) == ["b"]
    assert jobs_to_step([*pictures, ("b", job(4, 0, 10))], computed=10, efficient_rows=4) == ["a"]


def test_pictures_join_at_once_then_a_few_at_each_step() -> None:
    assert [room(n, at_once=8, later=6) for n in range(16)] == [8, 7, 6, 5, 4, 4, 4, 4, 4, 4, 4, 3, 2, 1, 0, 0]
    assert [room(n, at_once=8, later=0) for n in range(10)] == [8, 7, 6, 5, 4, 3, 2, 1, 0, 0]


def test_small_jobs_go_first_and_a_large_one_waits() -> None:
    jobs = {"large": job(16, 256), "small": job(4, 16), "middle": job(8, 60)}.items()
    assert jobs_to_step(jobs, computed=0, efficient_rows=12) == ["small", "middle"]
    assert jobs_to_step(jobs, computed=0, efficient_rows=13) == ["small", "middle", "large"]  # there is room for it


def test_jobs_that_delay_nobody_step_together() -> None:
    alike = {str(i): job(1, 4) for i in range(32)}
    assert jobs_to_step(alike.items(), computed=0, efficient_rows=8) == list(alike)
    small = {str(i): job(2, 10) for i in range(8)}
    joins = int(DELAY_LIMIT * 80)
    jobs = {**small, "joins": job(8, joins), "waits": job(8, int(DELAY_LIMIT * (80 + joins)) + 1)}
    assert jobs_to_step(jobs.items(), computed=0, efficient_rows=16) == [*small, "joins"]
    two = [("a", job(16, 64)), ("b", job(16, 64))]
    assert jobs_to_step(two, computed=0, efficient_rows=16) == ["a"]  # together both would take twice as long


def test_one_job_steps_whatever_its_size() -> None:
    assert jobs_to_step([("a", job(64, 1024))], computed=0, efficient_rows=1) == ["a"]
    assert jobs_to_step([], computed=0, efficient_rows=1) == []


@pytest.mark.parametrize("small", [4, 16, 40])
def test_a_large_job_does_not_wait_forever(small: int) -> None:
    """Small jobs arrive one after the other; the large job steps once enough rows were computed since it joined."""
    computed, large = 0, job(16, 256)
    jobs = {"small": job(4, small), "large": large}
    while jobs_to_step(jobs.items(), computed, efficient_rows=4)[0] == "small":
        computed += 4
        jobs["small"] = job(4, small, computed)
    assert computed * AGING == pytest.approx(256 - small, abs=5 * AGING)
