"""Redis, a worker, the API and the webhooks' worker in one go, for `python -m service`: started, watched, stopped.

Knows processes, not what they do.
"""

import collections
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from service.local.redis_server import RedisServer, die_with_parent
from service.telemetry.logs import get_logger

log = get_logger(__name__)

HOST = "127.0.0.1"  # loopback only, where no keys are needed
READY_TIMEOUT_S = 180.0  # loading torch and the model from a slow disk
LOOK_AGAIN_S = 0.1  # between two looks at the children
DRAIN_S = "1"  # all of it ends, and nobody is there to take over: what --state keeps is gone on with at the next start
STOP_TIMEOUT_S = 10.0  # a child that takes longer is killed
MAX_DEATHS, WITHIN_S = 5, 60.0  # a child that dies more often is not started again


class StartFailed(RuntimeError):
    """The service did not come up; the message says which part."""


class Child:
    """A process that is started again when it dies, within reason."""

    def __init__(self, name: str, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.name, self._start = name, start
        self.deaths: collections.deque[float] = collections.deque(maxlen=MAX_DEATHS)
        self.process = start()

    def revive(self) -> None:
        """Starts it again if it has died. StartFailed if that happened too often."""
        code = self.process.poll()
        if code is None:
            return
        now = time.monotonic()
        if len(self.deaths) == MAX_DEATHS and now - self.deaths[0] < WITHIN_S:
            raise StartFailed(f"the {self.name} died {MAX_DEATHS + 1} times within {WITHIN_S:.0f} s")
        self.deaths.append(now)
        log.warning("part ended; starting it again", part=self.name, code=code)
        self.process = self._start()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.warning("part does not end; killing it", part=self.name)
                self.process.kill()
                self.process.wait()


class Supervisor:
    """Runs everything on this machine. `redis_url` is an existing Redis; None starts one with its data in `state`."""

    def __init__(self, *, port: int, state: Path, redis_url: str | None, webhooks: bool = False) -> None:
        self.port, self.state, self.redis_url, self.webhooks = port, state, redis_url, webhooks
        self.children: list[Child] = []  # in the order they were started
        self.stopping = False  # set by signals' handlers: a second one inside Event.set() would deadlock

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Starts all, calls `on_ready` with the address, and returns after Ctrl-C or SIGTERM with everything stopped.

        StartFailed, with everything stopped as well, if a part does not come up or keeps dying.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        _check_port(self.port)
        try:
            self._start()
            if self._wait_until_ready():
                on_ready(f"http://{HOST}:{self.port}")
            while not self.stopping:
                time.sleep(LOOK_AGAIN_S)
                for child in self.children:
                    child.revive()
        finally:
            for child in reversed(self.children):
                child.stop()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _start(self) -> None:
        environment = {"LABELGRID_DRAIN_S": DRAIN_S, **os.environ}
        if self.redis_url is None:
            server = RedisServer(self.state)
            self.children.append(Child("Redis server", server.start))
            environment["LABELGRID_REDIS_URL"] = server.url
        parts = [("worker", ["worker"]), ("API", ["api", "--host", HOST, "--port", str(self.port)])]
        if self.webhooks:
            parts.append(("webhook worker", ["webhooks"]))
        for name, arguments in parts:
            self.children.append(Child(name, _python(arguments, environment)))

    def _wait_until_ready(self) -> bool:
        """True when the service is ready, False when it is to stop. A part that dies now will not do better later."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            time.sleep(LOOK_AGAIN_S)
            if self.stopping:
                return False
            for child in self.children:
                if child.process.poll() is not None:
                    raise StartFailed(f"the {child.name} ended with {child.process.returncode} while starting")
            if _is_ready(self.port):
                return True
        raise StartFailed(f"not ready after {READY_TIMEOUT_S:.0f} s")


def _python(arguments: list[str], environment: Mapping[str, str]) -> Callable[[], subprocess.Popen[bytes]]:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "service", *arguments],
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for us alone; we stop the parts in order
            preexec_fn=die_with_parent,
        )

    return start


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise StartFailed(f"port {port} on {HOST} cannot be used: {error.strerror}") from error


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
