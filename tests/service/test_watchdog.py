"""The watchdog: a loop that hangs ends its process, one that moves does not; and the file that supervisors see."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from service import watchdog
from service.__main__ import main
from service.settings import SettingError, Settings
from service.store import workers
from service.store.jobs import JobStore
from tests.service.api.answers import problem

HANGS = """
import time
from service import watchdog
from service.settings import Settings
watchdog.TICK_S = 0.1
dog = watchdog.Watchdog(Settings(stalled_after_s=0.4))
begun = time.monotonic()
while time.monotonic() - begun < 2:
    dog.moved()
    time.sleep(0.01)
print("it moved", flush=True)
def the_step_that_hangs():
    time.sleep(60)
the_step_that_hangs()
"""


def test_a_process_ends_only_once_its_loop_hangs_and_says_where() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "it moved\n")
    assert "in the_step_that_hangs" in done.stderr


def test_a_service_whose_only_worker_hangs_is_not_ready(client: httpx.Client, alive: JobStore) -> None:
    assert client.get("/readyz").status_code == 200
    workers.announce(alive.connection, "w", {"stalled": True}, alive.settings.lease_s)
    problem(client.get("/readyz"), 503, "no-worker")
    problem(client.post("/generate", json={"labels": [["red cube"]]}), 503, "no-worker")


# The file.


def checked(monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    """Return the exit status of `python -m service check`, with a Redis that is away."""
    monkeypatch.setenv("LABELGRID_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr(sys, "argv", ["service", "check", *options])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_liveness_needs_the_file_but_no_redis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    monkeypatch.setenv("LABELGRID_ALIVE_FILE", str(file))
    settings = Settings()
    assert checked(monkeypatch, "--liveness") == 1
    watchdog.touch(settings)
    assert (checked(monkeypatch, "--liveness"), checked(monkeypatch)) == (0, 1)
    before = time.time() - settings.stalled_after_s - watchdog.MAX_AGE_S - 1
    os.utime(file, (before, before))
    assert checked(monkeypatch, "--liveness") == 1
    watchdog.touch(settings)
    watchdog.reset(settings)  # after a restart in the same container
    assert checked(monkeypatch, "--liveness") == 1


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"LABELGRID_ALIVE_FILE=.*: cannot be written"):
        watchdog.reset(Settings(alive_file=tmp_path / "absent" / "alive"))
    watchdog.touch(Settings(alive_file=tmp_path / "absent" / "alive"))  # later it is no reason to end
