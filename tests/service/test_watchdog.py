"""The watchdog: a loop that hangs ends its process; one that was paused does not."""

import subprocess
import sys
import threading
import time

import httpx
import pytest

from service import watchdog
from service.store import workers
from service.store.jobs import JobStore
from tests.service.api.answers import problem

HANGS = """
import threading, time
from service import watchdog
watchdog.TICK_S = 0.05
threading.Thread(target=watchdog.watch, args=(lambda: 1.0, 0.2, threading.Event())).start()
def the_step_that_hangs():
    time.sleep(60)
the_step_that_hangs()
"""


def test_a_process_whose_loop_hangs_ends_and_says_where() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == watchdog.EXIT_HUNG
    assert "in the_step_that_hangs" in done.stderr


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit statuses with which the watchdog would have ended the process."""
    found: list[int] = []
    monkeypatch.setattr(watchdog, "end_process", found.append)
    monkeypatch.setattr(watchdog, "TICK_S", 0.001)
    return found


def test_progress_starts_the_count_again(ends: list[int]) -> None:
    ticks = iter([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    ended = threading.Event()

    def progress() -> float:
        if (tick := next(ticks, None)) is None:
            ended.set()
            return 3.0
        return tick

    watchdog.watch(progress, 0.004, ended)
    assert ends == []


def test_time_in_which_the_process_was_paused_does_not_count(ends: list[int]) -> None:
    ended = threading.Event()

    def progress() -> float:
        time.sleep(0.1)  # as after SIGSTOP: much longer than the limit
        ended.set()
        return 1.0

    watchdog.watch(progress, 0.01, ended)
    assert ends == []


def test_a_service_whose_only_worker_hangs_is_not_ready(client: httpx.Client, alive: JobStore) -> None:
    assert client.get("/readyz").status_code == 200
    workers.announce(alive.connection, "w", {"stalled": True}, alive.settings.lease_s)
    problem(client.get("/readyz"), 503, "no-worker")
    problem(client.post("/generate", json={"labels": [["red cube"]]}), 503, "no-worker")
