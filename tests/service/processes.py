"""Helpers for tests that start processes of the service."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys
from service.store.jobs import new_id
from shared.checkpoint import read_info
from shared.options import SamplingOptions
from shared.registry import resolve
from tests.paths import ROOT

T = TypeVar("T")


def until(condition: Callable[[], T], *, timeout_s: float = 120.0) -> T:
    """Wait until the condition returns something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not, it only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> set[int]:
    """Return the ids of a process's child processes."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.add(int(entry.name))
    return found


def environment(settings: Settings) -> dict[str, str]:
    """Return this process's environment with these settings."""
    names = ("storage", "redis_url", "device", "lease_s", "heartbeat_s", "batch_pictures", "batch_rows", "drain_s")
    return {**os.environ, **{f"LABELGRID_{name.upper()}": str(getattr(settings, name)) for name in names}}


def clean_environment() -> dict[str, str]:
    """Return this process's environment without any settings but the device."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LABELGRID_", "REDIS_"))}
    return {**kept, "LABELGRID_DEVICE": "cpu"}


def run_all(port: int, storage: Path) -> list[str]:
    """Return the command line that runs everything."""
    return [sys.executable, "-m", "service", "--port", str(port), "--storage", str(storage)]


@contextlib.contextmanager
def worker_processes(
    connection: Redis, settings: Settings, count: int, log: IO[str] | None = None
) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Run worker processes and give them, once they are ready, by process id. `log` receives their stderr."""
    line = [sys.executable, "-m", "service", "worker"]
    started = [subprocess.Popen(line, cwd=ROOT, env=environment(settings), stderr=log) for _ in range(count)]
    try:
        until(lambda: connection.scard(keys.WORKERS) == count or any(one.poll() is not None for one in started))
        yield {one.pid: one for one in started}
    finally:
        for one in started:
            one.kill()
            one.wait()


def new_job(settings: Settings, *, steps: int, pictures: int) -> JobRecord:
    return JobRecord(
        id=new_id(),
        kind="generate",
        created_at=time.time(),
        model="toy",
        digest=read_info(resolve(settings.storage, "toy", "denoiser")).digest,
        labels=[["red cube"], ["blue sphere", "gray cube"]] * (pictures // 2),
        seed=3,
        columns=4,
        options=SamplingOptions(steps=steps),
    )
