"""Runs the service for a benchmark: Redis, API and workers as processes on free ports, stopped at the end."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.results import ROOT, STORAGE
from service.local.demo import free_port
from service.local.redis_server import RedisServer, die_with_parent

READY_S = 600.0
WAIT_S = 3600  # for a request; more than a busy machine takes


class NotUp(RuntimeError):
    """A part of the service did not come up."""


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
        self.api = start(["service", "api", "--host", "127.0.0.1", "--port", str(self.port)], self.environment)
        self.wait_for("/healthz")

    def start_workers(self, count: int, module: tuple[str, ...] = ("service", "worker"), **environment: str) -> None:
        more = [start(module, {**self.environment, **environment}) for _ in range(count)]
        self.workers += more
        self.wait_for("/readyz")
        until(lambda: len(self._alive()) >= len(self.workers), f"{len(self.workers)} workers")

    def _alive(self) -> list[object]:
        from service.store import workers
        from service.store.connection import connect

        return list(workers.list_live(connect(self.redis.url)))

    def stop_workers(self) -> None:
        for worker in self.workers:
            stop(worker)
        self.workers.clear()

    def wait_for(self, path: str) -> None:
        wait_for(self.address + path)


def wait_for(url: str) -> None:
    """Wait until a GET is answered with 200. NotUp after READY_S."""

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, timeout=5).status_code == 200
        return False

    until(answers, f"{url} to answer 200")


def until(condition: Callable[[], object], what: str, timeout_s: float = READY_S) -> None:
    """Wait until a condition is true. NotUp after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise NotUp(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.02)


def start(module: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a module with its arguments as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process; kill it if it does not end within 20 s."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process so far, over all its threads."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def memory_mib(process: subprocess.Popen[bytes]) -> float:
    """Return a process's resident memory."""
    return psutil.Process(process.pid).memory_info().rss / 2**20


@contextlib.contextmanager
def stack(workers: int = 1, **environment: str) -> Iterator[Stack]:
    """Run a service with `workers` workers. Variables such as LABELGRID_BATCH_PICTURES apply to all its processes."""
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as folder:
        redis = RedisServer(Path(folder))
        redis.start()
        own = {"LABELGRID_REDIS_URL": redis.url, "LABELGRID_STORAGE": str(STORAGE), "LABELGRID_WAIT_S": str(WAIT_S)}
        own |= {"LABELGRID_LOG_FORMAT": "json"}  # as in the containers
        running = Stack(redis, {**os.environ, **own, **environment}, free_port())
        try:
            running.start_api()
            if workers:
                running.start_workers(workers)
            yield running
        finally:
            running.stop_workers()
            if running.api is not None:
                stop(running.api)
            redis.stop()
