"""Starts, watches and stops Redis, workers and the API, for `python -m service`.

Knows processes, not what they do.
"""

import collections
import contextlib
import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.local.redis_server import STOP_TIMEOUT_S, RedisServer, die_with_parent, stop
from service.settings import StartError
from service.telemetry.logs import get_logger

log = get_logger(__name__)

HOST = "127.0.0.1"  # loopback only, where no keys are needed
READY_TIMEOUT_S = 180.0  # long enough to load torch and the model from a slow disk
CHECK_EVERY_S = 0.1
DRAIN_S = 1.0  # short: no other worker could take over; with --state, unfinished jobs resume at the next start
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, AMD, and either under WSL
MAX_DEATHS, WITHIN_S = 5, 60.0  # a process that dies more often ends everything


class Child:
    """A process that is restarted when it dies, up to MAX_DEATHS times within WITHIN_S."""

    def __init__(self, name: str, start: Callable[[], subprocess.Popen[Any]]) -> None:
        self.name, self._start = name, start
        self.deaths: collections.deque[float] = collections.deque(maxlen=MAX_DEATHS)
        self.process = start()

    def revive(self) -> None:
        """Restart the process if it has died. Raises StartError if that happened too often."""
        code = self.process.poll()
        if code is None:
            return
        now = time.monotonic()
        if len(self.deaths) == MAX_DEATHS and now - self.deaths[0] < WITHIN_S:
            raise StartError(f"the {self.name} died {MAX_DEATHS + 1} times within {WITHIN_S:.0f} s")
        self.deaths.append(now)
        log.warning("process ended; restarting it", part=self.name, code=code)
        self.process = self._start()


def worker_environments(workers: int | None, device: str) -> list[dict[str, str]]:
    """Return the variables of each worker: one for each GPU, or CPU workers that share the cores.

    `workers`: how many, or None for as many as there are GPUs, else one, which uses all cores (docs/dev/decisions.md).
    `device`: LABELGRID_DEVICE. If it names one, all workers use it.
    """
    gpus = count_gpus() if device == "auto" else 0
    if gpus:
        return [{"LABELGRID_DEVICE": f"cuda:{i % gpus}"} for i in range(workers or gpus)]
    if workers is None or workers == 1 or device.startswith("cuda"):
        return [{}] * (workers or 1)
    share = max(1, (os.cpu_count() or 1) // workers)
    return [{"OMP_NUM_THREADS": str(share)}] * workers


def count_gpus() -> int:
    """Return how many GPUs torch sees. A process asks it, only where a driver is: torch takes a second to import."""
    if not any(Path(driver).exists() for driver in GPU_DRIVERS):
        return 0
    line = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


@dataclass(kw_only=True)
class Supervisor:
    """Runs everything on this machine. Without a `redis_url` it starts a Redis server with its data in `state`.

    `workers`: the variables that each worker has of its own.
    """

    port: int
    state: Path
    redis_url: str | None
    drain_s: float = DRAIN_S
    workers: Sequence[Mapping[str, str]] = ({},)
    children: list[Child] = field(default_factory=list, init=False)  # in the order they were started
    stopping: bool = field(default=False, init=False)  # no Event: a second signal during Event.set() would deadlock

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Start everything, call `on_ready` with the address, and stop everything after Ctrl-C or SIGTERM.

        Raises StartError, after stopping everything, if a process does not start or keeps dying.
        """

        def end(*_: object) -> None:
            self.stopping = True

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end)
        _check_port(self.port)
        try:
            self._start()
            self._wait_until_ready()
            if not self.stopping:
                on_ready(f"http://{HOST}:{self.port}")
            while not self.stopping:
                time.sleep(CHECK_EVERY_S)
                for child in self.children:
                    child.revive()
        finally:
            for child in reversed(self.children):
                stop(child.process, self.drain_s + STOP_TIMEOUT_S)

    def _start(self) -> None:
        environment = {**os.environ, "LABELGRID_DRAIN_S": str(self.drain_s)}
        environment.setdefault("LABELGRID_PICTURES", str(self.state / "pictures"))
        environment.setdefault("MALLOC_ARENA_MAX", "2")  # as in the images
        if self.redis_url is None:
            server = RedisServer(self.state)
            self.children.append(Child("Redis server", server.start))
            environment["LABELGRID_REDIS_URL"] = server.url
        commands: list[tuple[str, list[str], Mapping[str, str]]] = [
            (f"worker {i}" if len(self.workers) > 1 else "worker", ["worker"], own)
            for i, own in enumerate(self.workers)
        ]
        commands.append(("API", ["api", "--host", HOST, "--port", str(self.port)], {}))
        for name, arguments, own in commands:
            start = functools.partial(
                subprocess.Popen,
                [sys.executable, "-m", "service", *arguments],
                env={**environment, **own},
                start_new_session=True,  # a terminal's Ctrl-C must not reach it: processes are stopped in order
                preexec_fn=die_with_parent,
            )
            self.children.append(Child(name, start))

    def _wait_until_ready(self) -> None:
        """Return once the service is ready or is to stop. Here a process that dies is not restarted."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.stopping and _ready_workers(self.port) < len(self.workers):
            for child in self.children:
                if (code := child.process.poll()) is not None:
                    raise StartError(f"the {child.name} ended with status {code} while starting; see its log")
            if time.monotonic() > deadline:
                raise StartError(f"the service is not ready after {READY_TIMEOUT_S:.0f} s; see the log")
            time.sleep(CHECK_EVERY_S)


def _check_port(port: int) -> None:
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise StartError(f"port {port} cannot be used: {error.strerror}; choose another with --port") from error


def _ready_workers(port: int) -> int:
    """Return how many workers are ready; 0 also while the API is not."""
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=5)) as api:
        api.request("GET", "/readyz")
        answer = api.getresponse()
        if answer.status == 200:
            return int(json.load(answer)["workers"])
    return 0
