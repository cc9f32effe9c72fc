"""Live workers: announced for a lease, withdrawn at once, forgotten once dead."""

import time

import pytest
from redis import Redis

from service.store import keys, workers


def test_a_worker_is_alive_for_one_lease(connection: Redis) -> None:
    workers.announce(connection, "w", {}, lease_s=0.1)
    assert workers.is_alive(connection, "w")
    time.sleep(0.15)
    assert not workers.is_alive(connection, "w")


def test_live_workers_are_listed_and_dead_ones_forgotten(connection: Redis) -> None:
    workers.announce(connection, "dead", {"host": "a"}, lease_s=0.01)
    workers.announce(connection, "left", {"host": "b"}, lease_s=60)
    workers.announce(connection, "live", {"host": "c"}, lease_s=60)
    workers.withdraw(connection, "left")
    time.sleep(0.02)
    assert workers.list_live(connection) == [{"host": "c"}]
    assert connection.smembers(keys.WORKERS) == {b"dead", b"live"}
    workers.forget_dead(connection)
    assert connection.smembers(keys.WORKERS) == {b"live"}


def test_ready_workers_are_asked_for_once_a_second_while_there_are_any(
    connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FRESH_S", 1.0)
    now = 0.0
    ready = workers.ReadyWorkers(connection, lambda: now)
    assert ready() == []
    workers.announce(connection, "w", {"host": "a"}, lease_s=60)
    workers.announce(connection, "ends", {"host": "b", "draining": True}, lease_s=60)
    assert ready() == [{"host": "a"}]  # at once, although none was found a moment ago
    workers.withdraw(connection, "w")
    now = 0.5
    assert ready() == [{"host": "a"}]
    now = 1.0
    assert ready() == []


def test_one_of_several_threads_asks_for_the_workers(connection: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FRESH_S", 1.0)
    now, asked = 0.0, list[float]()
    ready = workers.ReadyWorkers(connection, lambda: now)

    def ask(connection: Redis) -> list[dict[str, str]]:
        asked.append(now)
        if len(asked) == 2:
            assert ready() == [{"host": "a"}]  # another thread, while this one waits for Redis
        return [{"host": "a"}]

    monkeypatch.setattr(workers, "list_live", ask)
    assert ready() == [{"host": "a"}]
    now = 1.0
    assert ready() == [{"host": "a"}]
    assert asked == [0.0, 1.0]
