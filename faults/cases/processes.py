"""Processes that die or stop, and pictures that two of them sample."""

import signal
from functools import partial
from typing import Any

from faults.harness import until
from faults.trial import LABELS, Trial
from service.store import keys

DEADLINE_S = 5.0  # less than what is left of a lease after a death, three heartbeats


def worker_killed(trial: Trial) -> None:
    """`kill -9` of one of two workers"""
    victim = trial.begin()
    trial.strike(partial(trial.stack.signal, victim, signal.SIGKILL))
    trial.recover()


def api_killed(trial: Trial) -> None:
    """`kill -9` of the API, while a client sends and retries requests"""
    trial.begin()
    trial.strike(partial(trial.stack.signal, "api", signal.SIGKILL))
    trial.recover()


def worker_paused(trial: Trial) -> None:
    """`SIGSTOP` of a worker until another has its pictures, then `SIGCONT`: both sample them"""
    victim = trial.begin()
    consumer, _ = trial.stack.consumers()[victim]
    trial.strike(partial(trial.stack.signal, victim, signal.SIGSTOP))
    until(lambda: trial.stack.pending(consumer) == 0, "another worker to take over the pictures")
    trial.stack.signal(victim, signal.SIGCONT)
    trial.recover()


def picture_claimed_twice(trial: Trial) -> None:
    """eight pictures of one worker are delivered to another, too, at the same time"""
    connection, stream = trial.stack.connection, keys.pictures(trial.stack.digest)
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


def preempted_three_times(trial: Trial) -> None:
    """`kill -9` of a picture's worker, three times, as when machines are preempted: its job finishes"""
    trial.begin()
    entry, first, _ = [one for one in trial.stack.claims() if one[1]][-1]  # killed before it can finish

    def holder(delivery: int) -> str:
        """Wait until the picture is delivered for the so many-th time, and return the worker that has it."""
        at = (entry, delivery)
        found = until(
            lambda: [name for one, name, times in trial.stack.claims() if (one, times) == at and name], f"{at}"
        )
        trial.say(f"delivery {delivery} is at {found[0]}, which is killed")
        return found[0]

    trial.strike(partial(trial.stack.signal, first, signal.SIGKILL))
    trial.stack.signal(holder(2), signal.SIGKILL)
    trial.end(partial(trial.stack.signal, holder(3), signal.SIGKILL))
    trial.recover()


def late_after_a_death(trial: Trial) -> None:
    """`kill -9` of a worker, with a deadline before its leases end: the job fails with the `reason` `deadline`"""
    trial.begin()
    connection, stream = trial.stack.connection, keys.pictures(trial.stack.digest)
    late = trial.submit_failing(LABELS[:1], "the deadline of its request", steps=300, deadline_s=DEADLINE_S)

    def holder() -> str:
        found: Any = connection.xrange(stream)
        entries = {entry for entry, fields in found if fields["job"] == late}
        return "".join(name for entry, name, _ in trial.stack.claims() if entry in entries)

    victim = until(holder, "a worker that draws it")
    trial.strike(partial(trial.stack.signal, victim, signal.SIGKILL))
    trial.recover()
    if (reason := connection.hget(keys.job(late), "reason")) != "deadline":
        raise RuntimeError(f"the late job failed for the reason {reason!r}")
