"""Shares the attempts that run at the same time among owners and receivers. Knows neither Redis nor HTTP."""

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from service.telemetry.logs import get_logger

log = get_logger(__name__)

SLOTS = 64  # attempts at the same time; each is a thread that mostly waits
OWNER_SLOTS = 32  # of one owner
RECEIVER_SLOTS = 8  # of one owner to one receiver, so that a receiver that never answers delays only its own messages

Lane = tuple[str, str]  # an owner and one of their receivers


class Turns:
    """Runs attempts in threads. A free slot goes to the owner who has the fewest, and to their receivers in turn."""

    def __init__(self, run: Callable[[str], None]) -> None:
        """`run`: makes the attempt of a name, and blocks until it is over."""
        self._run = run
        self._threads = ThreadPoolExecutor(SLOTS, thread_name_prefix="webhook")
        self._lock = threading.Lock()
        self._names: set[str] = set()  # pending and running
        self._pending: dict[Lane, deque[str]] = {}  # the lane served last comes last
        self._owners: Counter[str] = Counter()  # slots in use
        self._lanes: Counter[Lane] = Counter()
        self._stopped = False

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str, owner: str, receiver: str) -> None:
        """Run the attempt as soon as a slot is free, unless it is pending or running."""
        with self._lock:
            if name not in self._names:
                self._names.add(name)
                self._pending.setdefault((owner, receiver), deque()).append(name)
                self._start()

    def stop(self) -> None:
        """Forget what is pending and wait for the attempts in progress."""
        with self._lock:
            self._stopped = True
        self._threads.shutdown()

    def _start(self) -> None:
        while not self._stopped and self._owners.total() < SLOTS and (free := self._free_lanes()):
            lane = min(free, key=lambda lane: self._owners[lane[0]])
            names = self._pending.pop(lane)
            name = names.popleft()
            if names:
                self._pending[lane] = names
            self._owners[lane[0]] += 1
            self._lanes[lane] += 1
            self._threads.submit(self._attempt, name, lane)

    def _free_lanes(self) -> list[Lane]:
        return [
            lane for lane in self._pending if self._owners[lane[0]] < OWNER_SLOTS and self._lanes[lane] < RECEIVER_SLOTS
        ]

    def _attempt(self, name: str, lane: Lane) -> None:
        try:
            self._run(name)
        except Exception:  # it stays in the outbox
            log.exception("webhook attempt failed", webhook=name)
        with self._lock:
            self._names.discard(name)
            self._owners -= Counter([lane[0]])  # drops those without slots
            self._lanes -= Counter([lane])
            self._start()
