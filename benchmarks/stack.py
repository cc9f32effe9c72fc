"""Runs the service for a benchmark: Redis, API and workers as processes on free ports, stopped at the end."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.results import STORAGE
from faults.harness import start, until
from service.local.demo import free_port
from service.local.redis_server import RedisServer, stop

LOG_TAIL = 2000  # characters
WAIT_S = 3600  # for a request; more than a busy machine takes
LEASE_S = 60  # a worker that gets no core for so long counts as dead; the default is 8 s, few on a busy machine


@dataclass
class Stack:
    """A running service. `environment`: the variables of its processes."""

    redis: RedisServer
    environment: dict[str, str]
    port: int
    api: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pids(self) -> dict[str, int]:
        """Return the process ids of worker, API, Redis and of this process, which runs the clients."""
        assert self.api is not None
        assert self.redis.process is not None
        (worker,) = self.workers
        parts = {"worker": worker.pid, "API": self.api.pid, "Redis": self.redis.process.pid}
        return {**parts, "the 32 clients": os.getpid()}

    def client(self) -> httpx.Client:
        # clients keep their connections, so that connecting is not measured
        return httpx.Client(base_url=self.address, timeout=300, limits=httpx.Limits(max_connections=None))

    def start_api(self) -> None:
        command = ["service", "api", "--host", "127.0.0.1", "--port", str(self.port)]
        self.api = start(command, self.environment, self.redis.folder / "api.log")
        until(lambda: got(self.port, "/healthz"), "the API")

    def start_workers(self, count: int, **environment: str) -> None:
        """Start workers, and wait until the API counts all of them."""
        for _ in range(count):
            log = self.redis.folder / f"worker-{len(self.workers)}.log"
            own = {**self.environment, **environment}
            self.workers.append(start(["service", "worker"], own, log))
        until(lambda: self._ready_workers() >= len(self.workers), f"{len(self.workers)} workers")

    def _ready_workers(self) -> int:
        if any(worker.poll() is not None for worker in self.workers):
            raise RuntimeError("a worker has ended")
        return int((got(self.port, "/readyz") or {"workers": 0})["workers"])

    def ends(self) -> str:
        """Return which processes have ended, and the end of each log."""
        parts = {"the API": self.api} | {f"worker {i}": worker for i, worker in enumerate(self.workers)}
        lines = [
            f"{name} has ended with {one.returncode}" for name, one in parts.items() if one and one.poll() is not None
        ]
        for log in sorted(self.redis.folder.glob("*.log")):
            lines.append(f"{log.name} ends with:\n{log.read_text(errors='replace')[-LOG_TAIL:]}")
        return "\n".join(lines)

    def stop_workers(self) -> None:
        for worker in self.workers:
            stop(worker)
        self.workers.clear()


def got(port: int, path: str) -> Any:
    """Return the JSON that a GET is answered with; None if nobody answers, or with another status than 200."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)  # httpx would take CPU time from what is starting
    with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
        connection.request("GET", path)
        answer = connection.getresponse()
        return json.loads(answer.read()) if answer.status == 200 else None
    return None


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process so far, over all its threads."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def memory_mib(process: subprocess.Popen[bytes]) -> float:
    """Return a process's resident memory."""
    return psutil.Process(process.pid).memory_info().rss / 2**20


@contextlib.contextmanager
def redis_server() -> Iterator[RedisServer]:
    """Run a Redis of one's own."""
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as folder:
        redis = RedisServer(Path(folder))
        redis.start()
        try:
            yield redis
        finally:
            redis.stop()


@contextlib.contextmanager
def stack(workers: int = 1, **environment: str) -> Iterator[Stack]:
    """Run a service with `workers` workers. Variables such as LABELGRID_BATCH_PICTURES apply to all its processes.

    An error inside gets the end of each process's log as a note.
    """
    with redis_server() as redis:
        own = {"LABELGRID_REDIS_URL": redis.url, "LABELGRID_STORAGE": str(STORAGE)}
        own |= {"LABELGRID_PICTURES": str(redis.folder / "pictures")}
        own |= {"LABELGRID_WAIT_S": str(WAIT_S), "LABELGRID_LOG_FORMAT": "json"}  # logs as in the containers
        own |= {"LABELGRID_LEASE_S": str(LEASE_S)}
        running = Stack(redis, {**os.environ, **own, **environment}, free_port())
        try:
            running.start_api()
            if workers:
                running.start_workers(workers)
            yield running
        except Exception as error:
            error.add_note(running.ends())
            raise
        finally:
            running.stop_workers()
            if running.api is not None:
                stop(running.api)
