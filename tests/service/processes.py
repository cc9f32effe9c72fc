"""Helpers for tests that start processes of the service."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
from redis import Redis

from service.__main__ import main
from service.contract.options import PictureOptions
from service.contract.records import JobRecord
from service.settings import Settings
from service.store import workers
from shared.checkpoint import read_info
from shared.registry import resolve
from tests.paths import ROOT
from tests.service.store.helpers import record

T = TypeVar("T")


def until(condition: Callable[[], T], *, timeout_s: float = 120.0, every_s: float = 0.02) -> T:
    """Wait until the condition returns something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(every_s)
    return found


def until_it_answers(process: subprocess.Popen[Any], url: str, wanted: Callable[[httpx.Response], object]) -> None:
    """Wait until an answer from `url` is as wanted. One client asks: a new one costs as much as a hundred requests."""

    def answers() -> object:
        assert process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return wanted(client.get(url))
        return False

    with httpx.Client() as client:
        until(answers, every_s=0.1)


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
    names = ["storage", "pictures", "redis_url", "device", "lease_s", "batch_pictures", "drain_s"]
    return {**os.environ, **{f"LABELGRID_{name.upper()}": str(getattr(settings, name)) for name in names}}


def clean_environment() -> dict[str, str]:
    """Return this process's environment without any settings but the device."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LABELGRID_", "REDIS_"))}
    return {**kept, "LABELGRID_DEVICE": "cpu"}


def run_all(port: int, storage: Path) -> list[str]:
    """Return the command line that runs everything."""
    return [sys.executable, "-m", "service", "--port", str(port), "--storage", str(storage)]


# A process that has imported what a worker needs, torch above all, and forks: seven seconds of imports less for each.
# `test_supervisor.py` starts workers as the command line does.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["service.worker.process", __name__])


def _run(command: Callable[[], object], variables: dict[str, str], log: str | None) -> None:
    """Run a command, as `python -m service worker`, in a forked process with these variables."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    if log is not None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    sys.argv = ["service", "worker"]
    command()


class WorkerProcess:
    """A worker in a process of its own, with the interface of `subprocess.Popen`. `log` receives its stderr."""

    def __init__(self, settings: Settings, log: Path | None = None, command: Callable[[], object] = main) -> None:
        arguments = command, environment(settings), None if log is None else str(log)
        with contextlib.chdir(ROOT):  # the process that forks imports from where it starts
            self._process = FORKS.Process(target=_run, args=arguments)
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.kill, self.terminate = self._process.kill, self._process.terminate

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.poll()


@contextlib.contextmanager
def worker_processes(
    connection: Redis, settings: Settings, count: int, log: Path | None = None, command: Callable[[], object] = main
) -> Iterator[dict[int, WorkerProcess]]:
    """Run worker processes and give them, once they are ready, by process id. `log` receives their stderr."""
    started = [WorkerProcess(settings, log, command) for _ in range(count)]
    try:
        ready = lambda: len(workers.ready(workers.list_live(connection)))  # noqa: E731
        until(lambda: ready() == count or any(one.poll() is not None for one in started))
        yield {one.pid: one for one in started}
    finally:
        for one in started:
            one.kill()
            one.wait()


def new_job(settings: Settings, *, steps: int, pictures: int) -> JobRecord:
    digest = read_info(resolve(settings.storage, "toy", "denoiser")).digest
    labels = [["red cube"], ["blue sphere", "gray cube"]] * (pictures // 2)
    return record(digest=digest, labels=labels, seed=3, columns=4, options=PictureOptions(steps=steps))
