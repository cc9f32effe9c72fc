"""Samples of memory and keys, one series for each process. A process that was restarted begins a new series."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from redis.exceptions import RedisError

from soak.stack import SoakStack
from soak.trend import Trend, trend

EVERY_S = 5.0
SLACK_S = 60.0  # a series may begin so much later, or end so much earlier, than the time that is looked at

Series = list[tuple[float, float]]  # seconds since the start, value


def private_bytes(pid: int) -> int | None:
    """Return a process's anonymous memory in RAM, without mapped files; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


class Sampler(threading.Thread):
    """Takes a sample every `EVERY_S`, unless `is_disturbed`."""

    def __init__(self, stack: SoakStack, is_disturbed: Callable[[], bool]) -> None:
        super().__init__(name="sampler", daemon=True)
        self.stack, self.is_disturbed = stack, is_disturbed
        self.series: dict[tuple[str, int], Series] = defaultdict(list)  # what, and the process's id or 0
        self.ended = threading.Event()
        self.begun = time.monotonic()

    def run(self) -> None:
        while not self.ended.wait(EVERY_S):
            if not self.is_disturbed():
                self._sample()

    def _sample(self) -> None:
        at = time.monotonic() - self.begun
        for name, child in list(self.stack.children.items()):
            if (found := private_bytes(child.process.pid)) is not None:
                self.series[f"{name}, memory", child.process.pid].append((at, found))
        try:
            used, keys = self.stack.connection.info("memory")["used_memory"], self.stack.connection.dbsize()
        except RedisError:  # it is restarting
            return
        self.series["redis, used_memory", self.stack.children["redis"].process.pid].append((at, used))
        self.series["redis, keys", 0].append((at, keys))

    def latest(self) -> dict[str, float]:
        """Return the last sample of each kind, of the newest process."""
        newest: dict[str, tuple[float, float]] = {}
        for (what, _), samples in list(self.series.items()):
            newest[what] = max(newest.get(what, (0.0, 0.0)), samples[-1])
        return {what: value for what, (_, value) in newest.items()}

    def trends(self, since_s: float, until_s: float) -> dict[str, Trend]:
        """Return the trends of the series that last from `since_s` to `until_s`, by what they measure.

        The memory of a process that was restarted meanwhile is left out: it grows while the process warms up.
        """
        found = dict[str, Trend]()
        for (what, _), samples in self.series.items():
            late = [(at, value) for at, value in samples if since_s <= at <= until_s]
            if late and late[0][0] <= since_s + SLACK_S and late[-1][0] >= until_s - SLACK_S:
                times, values = zip(*late, strict=True)
                found[what] = trend(times, values)
        return found
