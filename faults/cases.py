"""The faults, a function for each. Its docstring's first line is what the report says of it."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from faults.trial import Trial


@dataclass(frozen=True)
class Case:
    """A fault and the service that it is done to."""

    run: Callable[[Trial], None]
    workers: int = 2
    worker_command: str = "service worker"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")

    @property
    def what(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0]


def worker_killed(trial: Trial) -> None:
    """kill -9 of a worker in the middle of a batch, beside another worker"""
    victim = trial.begin()
    trial.strike(lambda: trial.stack.signal(victim, signal.SIGKILL))
    trial.recover()


def api_killed(trial: Trial) -> None:
    """kill -9 of the API, while a client sends requests and sends them again"""
    trial.begin()
    trial.strike(lambda: trial.stack.signal("api", signal.SIGKILL))
    trial.recover()


def redis_killed(trial: Trial) -> None:
    """kill -9 of Redis, which starts again from its append-only file"""
    trial.begin()
    trial.strike(lambda: trial.stack.signal("redis", signal.SIGKILL))
    trial.recover()


CASES = {case.name: case for case in (Case(worker_killed), Case(api_killed), Case(redis_killed))}
