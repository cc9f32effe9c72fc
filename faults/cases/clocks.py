"""Clocks that jump."""

import time

from faults import clock
from faults.trial import LARGE, Trial

HOUR_S = 3600


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
