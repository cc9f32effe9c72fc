"""The watchdog: a loop that hangs ends its process, one that moves does not."""

import subprocess
import sys

import httpx

from service.store import workers
from service.store.jobs import JobStore
from tests.service.api.answers import problem
from tests.service.conftest import Command

HANGS = """
import time
from service.telemetry import boundary
boundary.TICK_S = 0.1
dog = boundary.Watchdog(0.4)
dog.ends_process = True
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


def test_a_probe_of_the_release_before_restarts_nothing(command: Command) -> None:
    assert command("check", "--liveness", environment={})[0] == 0
