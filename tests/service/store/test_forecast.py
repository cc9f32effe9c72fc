"""Forecasts: the pictures ahead are those that the queue dispatches first; time is rows over the workers' rate."""

import pytest
from redis import Redis

from service.store.forecast import STEPPING, FairQueue, Forecast, OpenJob, Rate, WorkerSpeed
from service.store.functions import call
from service.store.jobs import JobStore
from tests.service.store.helpers import add_job, record


def job(id_: str, total: int, owner: str = "", *, dispatched: int = 0, done: int = 0, cost: float = 10.0) -> OpenJob:
    return OpenJob(id_, owner, total, dispatched, done, cost)


def speeds(*rates: float, max_pictures: int = 1000) -> list[WorkerSpeed]:
    return [WorkerSpeed(rate, max_pictures) for rate in rates]


def forecast(own: str, *jobs: OpenJob, rates: tuple[float, ...] = (1.0,), max_pictures: int = 1000) -> Forecast:
    queue = FairQueue(jobs)
    found = queue.forecast(queue.jobs[own], speeds(*rates, max_pictures=max_pictures))
    assert found is not None
    return found


def test_a_job_alone_takes_its_rows_over_the_rate_and_half_of_what_is_in_progress() -> None:
    assert forecast("a", job("a", 4)) == Forecast(0, 40.0)
    assert forecast("a", job("a", 4, dispatched=3, done=1)) == Forecast(0, 10.0 + 2 * 5.0)
    assert forecast("a", job("a", 4, dispatched=4, done=4), job("b", 9, dispatched=9)) == Forecast(0, 0.0)
    assert FairQueue([]).forecast(job("a", 4), ()) is None
    assert FairQueue([]).forecast(job("a", 4), speeds(0.0)) is None


def test_a_job_is_on_as_many_workers_as_its_pictures_need() -> None:
    """A free worker takes half of its pictures at once."""
    assert forecast("a", job("a", 1), rates=(1.0, 4.0, 0.0), max_pictures=4) == Forecast(0, 2.5)
    assert forecast("a", job("a", 2), rates=(1.0, 4.0), max_pictures=4) == Forecast(0, 5.0)
    assert forecast("a", job("a", 3), rates=(1.0, 4.0), max_pictures=4) == Forecast(0, 6.0)


def test_pending_pictures_come_in_turns() -> None:
    others = [job("b", 2, cost=1.0), job("c", 4, cost=2.0)]
    assert forecast("a", job("a", 4), *others) == Forecast(2 + 4, 40.0 + 2 * 1.0 + 4 * 2.0)
    elsewhere = [
        job("d", 5, "other", cost=2.0),
        job("e", 3, "other", cost=4.0),
    ]  # gives one a round
    found = forecast("a", job("a", 2, cost=32.0), *others, *elsewhere)
    mean = (5 * 2 + 3 * 4) / 8
    assert (found.ahead, found.seconds) == (2 + 2 + 6, pytest.approx(64.0 + 2 * 1.0 + 2 * 2.0 + 6 * mean))


def test_smaller_jobs_come_first_and_larger_ones_only_fill_a_step() -> None:
    small, large = job("b", 2, dispatched=2), job("c", 100, dispatched=100)
    assert forecast("a", job("a", STEPPING), small).seconds == STEPPING * 10.0 + 2 * 5.0
    assert forecast("a", job("a", STEPPING), large).seconds == STEPPING * 10.0
    assert forecast("a", job("a", STEPPING - 3), large).seconds == (STEPPING - 3) * 10.0 + 3 * 10.0
    assert forecast("a", job("a", 1, dispatched=1), job("c", 4, dispatched=4)).seconds == 5.0 + 4 * 5.0
    assert forecast("a", job("a", 1, dispatched=1), large).ahead == 0


def test_larger_jobs_come_first_where_no_worker_has_room() -> None:
    """The smaller of them, and as many pictures as must end before the job's last one has room."""
    others = job("c", 40, dispatched=20), job("d", 40, dispatched=20, cost=100.0)
    waiting = job("a", STEPPING)
    assert forecast("a", waiting, *others, max_pictures=70).seconds == STEPPING * 10.0
    assert forecast("a", waiting, *others, max_pictures=60).seconds == STEPPING * 10.0 + 10 / 30 * (10 + 10) * 10.0
    dispatched = job("a", STEPPING, dispatched=STEPPING)
    assert forecast("a", dispatched, *others, max_pictures=10).seconds == STEPPING * 5.0


def test_a_job_that_is_not_queued_yet_comes_last() -> None:
    assert FairQueue([job("b", 3), job("c", 1)]).forecast(job("new", 2), speeds(2.0)) == Forecast(3, (20.0 + 30.0) / 2)


def test_a_rate_is_of_work_and_mostly_of_the_latest() -> None:
    rate = Rate()
    assert rate.per_s == 0.0
    rate.add(100, 10.0)
    assert rate.per_s == 10.0
    rate.add(0, Rate.HALF_LIFE_S)
    assert rate.per_s == pytest.approx(50 / (5 + Rate.HALF_LIFE_S))


@pytest.mark.parametrize(
    "sizes", [{"": [3]}, {"": [1, 5, 2]}, {"x": [4, 1], "y": [6]}, {"x": [2, 2, 9], "y": [1], "z": [30]}]
)
def test_what_is_ahead_is_what_the_queue_dispatches_before(
    store: JobStore, connection: Redis, sizes: dict[str, list[int]]
) -> None:
    """Exactly for an owner's last job, but for the last round of other owners; other jobs may be done earlier."""
    records = [record(pictures, owner=owner, digest="d" * 64) for owner, counts in sizes.items() for pictures in counts]
    for one in records:
        add_job(store, one)
    queue = FairQueue(
        OpenJob(id_, owner, int(total), int(dispatched), done, float(cost))
        for id_, owner, total, dispatched, done, cost in call(connection, "queue", "d" * 64)
    )
    assert {one.id: one.total for one in queue.jobs.values()} == {one.id: one.total for one in records}
    leased, _ = call(connection, "claim", "d" * 64, "w", 1000)
    order = [fields[1] for _, fields in leased]
    for one in records:
        last = len(order) - 1 - order[::-1].index(one.id)
        before = sum(id_ != one.id for id_ in order[:last])
        found = queue.forecast(queue.jobs[one.id], speeds(1.0))
        assert found is not None
        assert found.ahead >= before
        if one.total == max(sizes[one.owner]) or one is [other for other in records if other.owner == one.owner][-1]:
            assert found.ahead <= before + len(sizes) - 1
