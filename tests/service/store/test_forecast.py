"""Forecasts: the pictures ahead are those that the queue dispatches first; time is rows over the workers' rate."""

import pytest
from redis import Redis

from service.store.forecast import BESIDE, FairQueue, Forecast, OpenJob, Rate
from service.store.functions import call
from service.store.jobs import JobStore
from tests.service.store.helpers import add_job, record


def job(id_: str, total: int, owner: str = "", *, dispatched: int = 0, done: int = 0, cost: float = 10.0) -> OpenJob:
    return OpenJob(id_, owner, total, dispatched, done, cost)


def forecast(own: str, *jobs: OpenJob, rates: tuple[float, ...] = (1.0,)) -> Forecast:
    queue = FairQueue(jobs)
    found = queue.forecast(queue.jobs[own], rates)
    assert found is not None
    return found


def test_a_job_alone_takes_its_rows_over_the_rate_and_half_of_what_is_in_progress() -> None:
    assert forecast("a", job("a", 4)) == Forecast(0, 40.0)
    assert forecast("a", job("a", 4), rates=(1.0, 3.0)) == Forecast(0, 10.0)
    assert forecast("a", job("a", 4, dispatched=3, done=1)) == Forecast(0, 10.0 + 2 * 5.0)
    assert forecast("a", job("a", 1), rates=(1.0, 4.0, 0.0)) == Forecast(0, 2.5)  # one picture is on one worker
    assert FairQueue([]).forecast(job("a", 4), ()) is None
    assert FairQueue([]).forecast(job("a", 4), (0.0,)) is None


def test_pending_pictures_come_in_turns() -> None:
    others = [job("b", 2, cost=1.0), job("c", 100, cost=2.0)]
    assert forecast("a", job("a", 4), *others) == Forecast(2 + 4, 40.0 + 2 * 1.0 + 4 * 2.0)
    elsewhere = [job("d", 50, "other"), job("e", 30, "other", cost=20.0)]  # that owner gives a picture each round: ten
    mean = (50 * 10 + 30 * 20) / 80
    found = forecast("a", job("a", 4), *others, *elsewhere)
    assert (found.ahead, found.seconds) == (6 + 10, pytest.approx(50.0 + 10 * mean))


def test_of_pictures_in_progress_those_of_larger_jobs_count_up_to_the_jobs_own_rows() -> None:
    small, large = job("b", 2, dispatched=2), job("c", 100, dispatched=100)
    assert forecast("a", job("a", 8), small).seconds == 80.0 + 2 * 5.0
    assert forecast("a", job("a", 8), large).seconds == 80.0 + 80.0
    assert forecast("a", job("a", 1), large).seconds == 10.0 + BESIDE * 10.0
    assert forecast("a", job("a", 1, dispatched=1), large).ahead == 0


def test_a_job_that_is_not_queued_yet_comes_last() -> None:
    assert FairQueue([job("b", 3), job("c", 1)]).forecast(job("new", 2), (2.0,)) == Forecast(2 + 1, (20.0 + 30.0) / 2)


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
        found = queue.forecast(queue.jobs[one.id], (1.0,))
        assert found is not None
        assert found.ahead >= before
        if one.total == max(sizes[one.owner]) or one is [other for other in records if other.owner == one.owner][-1]:
            assert found.ahead <= before + len(sizes) - 1
