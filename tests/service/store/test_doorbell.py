"""The doorbell: one RQ job for each model, which wakes an idle worker, and costs nothing but time if it is lost."""

import pytest
from redis import Redis

from service.store.connection import connect
from service.store.doorbell import Doorbell
from tests.service.store.ageing import MINUTE_S, age
from tests.service.store.helpers import full

TOY, OTHER = "d" * 64, "e" * 64


def answered(bell: Doorbell) -> list[str | None]:
    """Answer all rings, as a worker does."""
    return [bell.wait(1) for _ in range(bell.queue.count)]


@pytest.fixture
def bell(connection: Redis) -> Doorbell:
    return Doorbell(connection, "q")


def test_a_model_has_one_rq_job_however_often_it_rings_and_rings_again_once_answered(bell: Doorbell) -> None:
    for _ in range(2):
        for digests in ([TOY], [TOY, OTHER], [OTHER, TOY]):
            bell.ring(digests)
        assert bell.queue.count == 2
        assert answered(bell) == [TOY, OTHER]
        assert list(bell.queue.connection.scan_iter("rq:job:*")) == []
    assert bell.wait(1) is None


def test_no_function_of_an_rq_job_is_run(bell: Doorbell, connection: Redis) -> None:
    """Whoever can write to Redis can name any function."""
    bell.queue.enqueue_call("shutil.rmtree", args=("x",), job_id="foreign")
    bell.ring([TOY])
    assert answered(bell) == ["foreign", TOY]
    assert connection.keys("rq:job:*") == []


@pytest.mark.parametrize("lost", ["its worker died", "the queue is gone"])
def test_a_lost_ring_costs_nothing_but_a_minute(bell: Doorbell, connection: Redis, lost: str) -> None:
    bell.ring([TOY])
    if lost == "its worker died":
        assert connection.lpop(bell.queue.key) is not None
    else:
        connection.delete(bell.queue.key)
    bell.ring([TOY])
    assert bell.queue.count == 0  # until the lost one is forgotten
    age(connection, MINUTE_S)
    bell.ring([TOY])
    assert answered(bell) == [TOY]


def test_a_redis_that_is_full_or_away_is_not_rung_and_nothing_is_raised(bell: Doorbell, connection: Redis) -> None:
    with full(connection):
        bell.ring([TOY, OTHER])
    assert bell.queue.count == 0
    with connect("redis://127.0.0.1:1") as away:
        Doorbell(away, "q").ring([TOY])
