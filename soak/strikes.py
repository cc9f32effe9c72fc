"""Faults at random times, planned from a seed before the soak begins."""

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from redis.exceptions import ConnectionError, OutOfMemoryError

from faults.trial import RETRY_S
from soak.stack import SoakStack

GAP_S = (30.0, 90.0)  # between two faults, uniform
LASTING_S = (2.0, 15.0)  # of a pause or a full Redis, uniform; up to about twice a lease
ROOM = 1 << 20  # bytes left for Redis before it is filled
FILLER = "filler"
KINDS = (
    ("kill", "api"),
    ("kill", "worker 0"),
    ("kill", "redis"),
    ("restart", "api"),
    ("restart", "worker 0"),
    ("pause", "api"),
    ("pause", "spare api"),
    ("pause", "worker 0"),
    ("pause", "worker 1"),
    ("pause", "redis"),
    ("fill", "redis"),
)


T = TypeVar("T")


@dataclass(frozen=True)
class Strike:
    """A fault `at_s` seconds after the start: `kill` is SIGKILL, `restart` SIGTERM, `pause` SIGSTOP and SIGCONT."""

    at_s: float
    kind: str
    target: str
    lasting_s: float


def plan(seed: int, seconds: float) -> list[Strike]:
    """Return the faults of a soak. Every kind comes once in each round, in random order; the last minute has none."""
    dice = random.Random(seed)
    deck: list[tuple[str, str]] = []
    strikes = list[Strike]()
    at_s = dice.uniform(*GAP_S)
    while at_s < seconds - 60:
        if not deck:
            deck = dice.sample(KINDS, len(KINDS))
        kind, target = deck.pop()
        lasting_s = dice.uniform(*LASTING_S) if kind in ("pause", "fill") else 0.0
        strikes.append(Strike(at_s, kind, target, lasting_s))
        at_s += lasting_s + dice.uniform(*GAP_S)
    return strikes


def unplanned(planned: Sequence[Strike], done: Sequence[Strike], deaths: Iterable[str]) -> list[str]:
    """Return which faults were not carried out, and which processes ended although no fault ended them."""
    ended = Counter(one.target for one in done if one.kind in ("kill", "restart"))
    found = [f"the fault {one.kind} {one.target} was not carried out" for one in planned[len(done) :]]
    return found + [f"the {name} ended by itself {count} times" for name, count in (Counter(deaths) - ended).items()]


class Striker(threading.Thread):
    """Carries out a plan. `active` while a fault lasts."""

    def __init__(self, stack: SoakStack, strikes: list[Strike], say: Callable[[str], None]) -> None:
        super().__init__(name="striker", daemon=True)
        self.stack, self.strikes, self.say = stack, strikes, say
        self.done: list[Strike] = []
        self.active = False

    def run(self) -> None:
        begun = time.monotonic()
        for strike in self.strikes:
            time.sleep(max(0.0, begun + strike.at_s - time.monotonic()))
            about = f" for {strike.lasting_s:.0f} s" if strike.lasting_s else ""
            self.say(f"  {strike.kind} {strike.target}{about}")
            self.active = True
            self._carry_out(strike)
            self.active = False
            self.done.append(strike)

    def _carry_out(self, strike: Strike) -> None:
        if strike.kind == "kill":
            self.stack.signal(strike.target, signal.SIGKILL)
        elif strike.kind == "restart":
            self.stack.signal(strike.target, signal.SIGTERM)
        elif strike.kind == "pause":
            self.stack.signal(strike.target, signal.SIGSTOP)
            time.sleep(strike.lasting_s)
            self.stack.signal(strike.target, signal.SIGCONT)
        else:
            with self._full_redis():
                time.sleep(strike.lasting_s)

    @contextlib.contextmanager
    def _full_redis(self) -> Iterator[None]:
        connection = self.stack.connection
        used = int(insist(lambda: connection.info("memory")["used_memory"]))
        insist(lambda: connection.config_set("maxmemory", used + ROOM))
        with contextlib.suppress(OutOfMemoryError):
            while True:
                connection.rpush(FILLER, b"x" * (1 << 14))
        yield
        insist(lambda: connection.delete(FILLER))
        insist(lambda: connection.config_set("maxmemory", 0))


def insist(command: Callable[[], T]) -> T:
    """Run a command of Redis, which may just have been restarted."""
    while True:
        try:
            return command()
        except ConnectionError:
            time.sleep(RETRY_S)
