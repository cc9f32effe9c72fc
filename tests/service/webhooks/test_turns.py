"""The attempts in progress: their limits, and who is next."""

import threading
from collections.abc import Iterator

import pytest

from service.webhooks.turns import OWNER_SLOTS, RECEIVER_SLOTS, SLOTS, Turns
from tests.service.processes import until


class Attempts:
    """Attempts that last until they are released."""

    def __init__(self) -> None:
        self.begun = list[str]()
        self.ends = dict[str, threading.Event]()
        self.turns = Turns(self._run)

    def _run(self, name: str) -> None:
        end = self.ends.setdefault(name, threading.Event())
        self.begun.append(name)
        end.wait()

    def release(self, name: str) -> None:
        self.ends[name].set()
        until(lambda: name not in self.turns)

    def stop(self) -> None:
        self._run = lambda name: None  # type: ignore[method-assign]
        for name in list(self.turns._names):
            self.ends.setdefault(name, threading.Event()).set()
        self.turns.stop()


@pytest.fixture
def attempts() -> Iterator[Attempts]:
    made = Attempts()
    yield made
    made.stop()


def test_a_receiver_that_never_answers_delays_only_its_own(attempts: Attempts) -> None:
    for i in range(100):
        attempts.turns.add(f"slow{i}", "alice", "slow")
    attempts.turns.add("a", "alice", "quick")
    attempts.turns.add("b", "bob", "slow")
    until(lambda: len(attempts.begun) == RECEIVER_SLOTS + 2)
    assert {"a", "b"} < set(attempts.begun)
    attempts.release("slow3")
    until(lambda: len(attempts.begun) == RECEIVER_SLOTS + 3)
    assert attempts.begun[-1] == f"slow{RECEIVER_SLOTS}"  # the oldest of those that are pending


def test_an_owner_with_many_receivers_leaves_slots_to_others(attempts: Attempts) -> None:
    for owner in ("alice", "bob"):
        for i in range(OWNER_SLOTS + 10):
            attempts.turns.add(f"{owner}{i}", owner, f"receiver{i}")
    assert 2 * OWNER_SLOTS == SLOTS
    until(lambda: len(attempts.begun) == SLOTS)
    assert sum(name.startswith("alice") for name in attempts.begun) == OWNER_SLOTS
    attempts.turns.add("carol0", "carol", "receiver")
    assert "carol0" not in attempts.begun
    attempts.release("alice0")  # alice has 10 more pending, older ones, but also more slots
    until(lambda: len(attempts.begun) == SLOTS + 1)
    assert attempts.begun[-1] == "carol0"


def test_an_owners_receivers_take_turns(attempts: Attempts) -> None:
    receivers = OWNER_SLOTS // RECEIVER_SLOTS + 1  # of which the last one finds no slot
    for receiver in range(receivers):
        for i in range(RECEIVER_SLOTS + 2):
            attempts.turns.add(f"{receiver}.{i}", "alice", str(receiver))
    for i, following in enumerate((f"0.{RECEIVER_SLOTS}", f"{receivers - 1}.0")):
        until(lambda count=OWNER_SLOTS + i: len(attempts.begun) == count)  # type: ignore[misc]
        attempts.release(f"0.{i}")
        until(lambda count=OWNER_SLOTS + i + 1: len(attempts.begun) == count)  # type: ignore[misc]
        assert attempts.begun[-1] == following


def test_an_attempt_that_is_pending_or_running_is_not_added_again(attempts: Attempts) -> None:
    for _ in range(3):
        attempts.turns.add("a", "", "receiver")
    until(lambda: attempts.begun == ["a"])
    attempts.release("a")
    attempts.ends.clear()
    attempts.turns.add("a", "", "receiver")
    until(lambda: attempts.begun == ["a", "a"])


def test_an_attempt_that_raises_frees_its_slot(caplog: pytest.LogCaptureFixture) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(name)

    turns = Turns(fail)
    for i in range(3 * RECEIVER_SLOTS):
        turns.add(str(i), "", "receiver")
    until(lambda: not turns._names)
    turns.stop()


def test_a_stop_waits_for_running_attempts_and_forgets_pending_ones(attempts: Attempts) -> None:
    for i in range(RECEIVER_SLOTS + 1):
        attempts.turns.add(str(i), "", "receiver")
    until(lambda: len(attempts.begun) == RECEIVER_SLOTS)
    stopping = threading.Thread(target=attempts.turns.stop)
    stopping.start()
    for i in range(RECEIVER_SLOTS):
        assert stopping.is_alive()
        attempts.ends[str(i)].set()
    stopping.join()
    assert str(RECEIVER_SLOTS) not in attempts.begun
