"""The faults, one function each. The docstring is the description in docs/reliability.md."""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
from redis.exceptions import OutOfMemoryError

from faults import clock, disconnects, flood, versions
from faults.harness import until
from faults.trial import BODIES, LABELS, LARGE, SMALL, Trial
from service.store import keys

HOUR_S = 3600
FULL_S = 15.0  # how long Redis stays full: longer than a lease
FILLER = "filler"
IMPATIENT = {"LABELGRID_STALLED_AFTER_S": "4"}


@dataclass(frozen=True)
class Case:
    """A fault, and the service into which it is injected."""

    run: Callable[[Trial], None]
    workers: int = 2
    worker_command: str = "service worker"
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)  # of every request
    clocks: bool = False  # whether its clocks can jump

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")

    @property
    def description(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


def worker_killed(trial: Trial) -> None:
    """`kill -9` of one of two workers in the middle of a batch"""
    victim = trial.begin()
    trial.strike(partial(trial.stack.signal, victim, signal.SIGKILL))
    trial.recover()


def api_killed(trial: Trial) -> None:
    """`kill -9` of the API, while a client sends and retries requests"""
    trial.begin()
    trial.strike(partial(trial.stack.signal, "api", signal.SIGKILL))
    trial.recover()


def redis_killed(trial: Trial) -> None:
    """`kill -9` of Redis, which restarts from its append-only file"""
    trial.begin()
    trial.strike(partial(trial.stack.signal, "redis", signal.SIGKILL))
    trial.recover()


def redis_full(trial: Trial) -> None:
    """Redis at its memory limit for 15 s, in the middle of batches"""
    connection = trial.stack.connection

    def limit() -> None:
        connection.config_set("maxmemory", connection.info("memory")["used_memory"] + (8 << 20))
        fill()

    def fill() -> None:
        with contextlib.suppress(OutOfMemoryError):
            while True:
                connection.rpush(FILLER, b"x" * (1 << 16))

    def is_refused() -> bool:
        fill()  # again, since jobs that end free memory
        answer = httpx.post(f"{trial.stack.address}/generate", json=BODIES[SMALL], timeout=30)
        if answer.status_code == 503:
            return True
        if answer.status_code != 200:
            raise RuntimeError(f"with a full Redis, POST /generate returned {answer.text}")
        trial.jobs[answer.json()["id"]] = SMALL
        return False

    ids = trial.submit(*LARGE)
    trial.begin()
    trial.strike(limit)
    until(is_refused, "a request that a full Redis refuses")
    read = httpx.get(f"{trial.stack.address}/jobs/{ids[0]}", timeout=30)
    if read.status_code != 200:
        raise RuntimeError(f"with a full Redis, GET /jobs returned {read.text}")
    time.sleep(FULL_S)
    trial.end(lambda: connection.delete(FILLER))
    trial.recover()


def worker_paused(trial: Trial) -> None:
    """`SIGSTOP` of a worker until another has taken over its pictures, then `SIGCONT`: both sample them"""
    victim = trial.begin()
    consumer, _ = trial.stack.consumers()[victim]
    trial.strike(partial(trial.stack.signal, victim, signal.SIGSTOP))
    until(lambda: trial.stack.pending(consumer) == 0, "another worker to take over the pictures")
    trial.stack.signal(victim, signal.SIGCONT)
    trial.recover()


def picture_claimed_twice(trial: Trial) -> None:
    """eight pictures in progress at one worker are delivered to another, which samples them at the same time"""
    connection, stream = trial.stack.connection, keys.stream(trial.stack.digest)
    trial.submit(2)
    first = trial.busiest()
    (other,) = (name for name in trial.stack.workers() if name != first)

    def claim_twice() -> None:
        trial.stack.signal(first, signal.SIGSTOP)  # so that the other worker claims them
        entries: Any = connection.xrange(stream)
        for _, fields in entries:
            connection.xadd(stream, fields)
        until(lambda: trial.stack.in_progress().get(other, 0) >= len(entries), "the other worker to claim them", 5)
        trial.stack.signal(first, signal.SIGCONT)

    trial.strike(claim_twice)
    trial.recover()


def poison_picture(trial: Trial) -> None:
    """a picture that fails in every step, in a batch with good ones: only its job fails"""
    trial.begin()
    trial.strike(lambda: trial.submit_failing([*LABELS, ["purple cube"]], "picture 4: RuntimeError: poison"))
    trial.recover()


def poison_picture_that_kills(trial: Trial) -> None:
    """a picture that kills every worker that samples it, in a batch with good ones: only its job fails, after three
    deaths; recovery is measured from the last"""
    _kills(trial, "purple sphere")


def _kills(trial: Trial, label: str) -> None:
    trial.begin()
    poisoned: list[str] = []
    trial.strike(lambda: poisoned.append(trial.submit_failing([[label]], "workers died 3 times")))
    struck_at = trial.struck_at
    trial.wait(poisoned)
    if len(trial.stack.deaths) != 3:
        raise RuntimeError(f"{len(trial.stack.deaths)} workers died instead of 3")
    trial.figures |= {
        "its job failed after, s": round(time.monotonic() - struck_at, 1),
    }
    trial.struck_at = trial.stack.deaths[-1][1]
    trial.recover()
    trial.figures["all open jobs ended after, s"] = round(time.monotonic() - struck_at, 1)


def hung_picture(trial: Trial) -> None:
    """a picture that hangs every worker that samples it, in a batch with good ones, with `stalled_after_s` = 4: each
    worker ends itself, and after three only the picture's job fails; recovery is measured from the last"""
    _kills(trial, "purple cylinder")


def hung_picture_one_worker(trial: Trial) -> None:
    """the same with one worker"""
    _kills(trial, "purple cylinder")


def _clock_jumps(trial: Trial, which: str, seconds: int) -> None:
    trial.begin()
    trial.strike(lambda: clock.jump(trial.stack.clocks[which], seconds))
    time.sleep(1.0)  # until every process has noticed
    trial.submit(*LARGE)
    trial.recover()


def clock_forward(trial: Trial) -> None:
    """the clock of API and workers jumps two hours ahead"""
    _clock_jumps(trial, "service", 2 * HOUR_S)


def clock_back(trial: Trial) -> None:
    """the clock of API and workers jumps two hours back"""
    _clock_jumps(trial, "service", -2 * HOUR_S)


def redis_clock_forward(trial: Trial) -> None:
    """the clock of Redis jumps half an hour ahead"""
    _clock_jumps(trial, "redis", HOUR_S // 2)


def redis_clock_back(trial: Trial) -> None:
    """the clock of Redis jumps half an hour back"""
    _clock_jumps(trial, "redis", -HOUR_S // 2)


def clients_leave(trial: Trial) -> None:
    """50 clients reset their connections after a job's first event, and 50 after sending a request; within 30 s the API
    waits for no job and no job counts as watched"""
    trial.submit(*LARGE)
    trial.begin()
    trial.strike(lambda: disconnects.connect_and_reset(trial, 50))
    until(lambda: trial.stack.blocked_reads() == 0 and not disconnects.watched(trial), "the API to wait for no job", 30)
    trial.recover()


CASES = {
    case.name: case
    for case in (
        Case(worker_killed),
        Case(api_killed),
        Case(redis_killed),
        Case(redis_full),
        Case(worker_paused),
        Case(picture_claimed_twice),
        Case(poison_picture, worker_command="faults.poisoned worker"),
        Case(poison_picture_that_kills, worker_command="faults.poisoned worker"),
        Case(hung_picture, worker_command="faults.poisoned worker", environment=IMPATIENT),
        Case(hung_picture_one_worker, 1, "faults.poisoned worker", IMPATIENT),
        Case(clock_forward, clocks=True),
        Case(clock_back, clocks=True),
        Case(redis_clock_forward, clocks=True),
        Case(redis_clock_back, clocks=True),
        Case(clients_leave),
        Case(versions.rolling_upgrade),
        Case(versions.rolling_downgrade),
        Case(versions.option_of_the_next_version),
        Case(flood.flood, workers=1, environment=flood.ENVIRONMENT, headers=flood.HEADERS),
    )
}
