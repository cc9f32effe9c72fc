"""Runs the service as real processes, on toy checkpoints: Redis with its append-only file, the API and workers.

Restarts a process that dies, as `python -m service` and containers do. Knows no faults.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
from redis.exceptions import ResponseError

from faults import clock
from service.local.demo import free_port
from service.local.redis_server import RedisServer, die_with_parent, find_binary
from service.local.supervisor import Child
from service.settings import Settings
from service.store import keys
from service.store.claims import GROUP
from service.store.connection import connect
from service.store.jobs import JobStore
from service.store.workers import list_live, ready
from shared.checkpoint import read_info
from shared.registry import resolve
from tests.toy_checkpoint import publish_toy_evaluator, publish_toys

ROOT = Path(__file__).parents[1]
LOOK_AGAIN_S = 0.02
PATIENCE_S = 600.0  # the longest wait for anything; longer is a failure, not a figure
T = TypeVar("T")


class NotInTime(RuntimeError):
    """Something expected did not happen in time."""


def until(
    condition: Callable[[], T | None], what: str, timeout_s: float = PATIENCE_S, every_s: float = LOOK_AGAIN_S
) -> T:
    """Wait until a condition is true, and return its value. NotInTime."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise NotInTime(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(every_s)
    return found


def settled(send: Callable[[], httpx.Response]) -> httpx.Response | None:
    """Send a request and return its answer; None for 429, 503 and a lost connection, after which a client retries."""
    try:
        answer = send()
    except httpx.TransportError:
        return None
    return None if answer.status_code in (429, 503) else answer


def expect(answer: httpx.Response, *statuses: int) -> httpx.Response:
    """Return the answer. RuntimeError if it has another status."""
    if answer.status_code not in statuses:
        asked = f"{answer.request.method} {answer.request.url.path}"
        raise RuntimeError(f"{asked} returned {answer.status_code}: {answer.text[:300]}")
    return answer


def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path = Path(os.devnull), folder: Path = ROOT
) -> subprocess.Popen[bytes]:
    """Start `python -m COMMAND` as a process in `folder`, with its output in `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            preexec_fn=die_with_parent,
        )


class Stack:
    """A service in `folder`, with logs in `folder`/NAME.log. `deaths`: which process died, and its monotonic time."""

    def __init__(self, folder: Path, environment: Mapping[str, str], clocks: bool) -> None:
        self.folder, self.port = folder, free_port()
        self.clocks = {name: folder / f"{name}-clock" for name in ("redis", "service")} if clocks else {}
        # The packaged server starts under libfaketime, and Debian's, which uses jemalloc, does not.
        binary = clock.command(self.clocks["redis"], find_binary()) if clocks else None
        self.redis = RedisServer(folder / "redis", binary)
        storage = folder / "storage"
        storage.mkdir()
        publish_toys(storage)
        publish_toy_evaluator(storage, "toy-evaluator", architecture="resnet18")  # the release before knows no other
        self.digest = read_info(resolve(storage, "toy", "denoiser")).digest
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("LABELGRID_", "REDIS_"))}
        self.environment = {
            **ours,
            "OMP_NUM_THREADS": "1",
            "LABELGRID_DEVICE": "cpu",
            "LABELGRID_BATCH_PICTURES": "16",
            "LABELGRID_STORAGE": str(storage),
            "LABELGRID_PICTURES": str(folder / "pictures"),
            "LABELGRID_CACHE": str(folder / "cache"),
            "LABELGRID_REDIS_URL": self.redis.url,
            **(clock.environment(self.clocks["service"]) if clocks else {}),
            **environment,
        }
        self.trees: dict[str, Path] = {}  # the source of processes that run another version
        self.held = set[str]()  # processes that are not restarted if they die
        self.beside: Any = None  # what the fault runs beside the service
        self.children: dict[str, Child] = {}
        self.deaths: list[tuple[str, float]] = []
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, workers: int, worker_command: str) -> None:
        """Start everything and return when it is ready. NotInTime."""
        self.children["redis"] = Child("Redis server", self._start_redis)
        self.connection = connect(self.redis.url)
        self.store = JobStore(self.connection, Settings(redis_url=self.redis.url, pictures=self.folder / "pictures"))
        self.run("api", f"service api --port {self.port}")
        for number in range(workers):
            self.run(f"worker {number}", worker_command)
        self._watcher.start()
        until(self._is_ready, "the service to be ready")
        until(lambda: len(ready(list_live(self.store.connection))) == workers, f"{workers} workers")

    def stop(self) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for child in reversed(self.children.values()):
            child.process.kill()
            child.process.wait()

    def _start_redis(self) -> subprocess.Popen[bytes]:
        process = self.redis.start()
        with connect(self.redis.url) as connection:
            connection.config_set("auto-aof-rewrite-percentage", 0)  # so that the file keeps all changes
        return process

    def run(self, name: str, command: str, **environment: str) -> None:
        """Run `python -m COMMAND`, and run it again whenever it ends."""

        def begin() -> subprocess.Popen[bytes]:
            variables, log = {**self.environment, **environment}, self.folder / f"{name}.log"
            return start(command.split(), variables, log, self.trees.get(name, ROOT))

        self.children[name] = Child(name, begin)

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_AGAIN_S):
            for name, child in list(self.children.items()):
                if name not in self.held and child.process.poll() is not None:
                    self.deaths.append((name, time.monotonic()))
                    child.deaths.clear()  # a supervisor would give up after some deaths
                    child.revive()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.address}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.children[name].process.pid, number)

    def replace(self, name: str, tree: Path) -> None:
        """Stop a process as a rolling restart does, start it again from the source in `tree`, and wait for it."""
        before = self.children[name].process
        self.trees[name] = tree
        before.terminate()
        until(lambda: self.children[name].process is not before, f"the {name} to stop")
        process = self.children[name].process
        if name == "api":
            until(self._is_ready, "the API to be ready")
        else:
            until(lambda: process.pid in [about["pid"] for about in list_live(self.store.connection)], f"the {name}")

    def check(self) -> int:
        """Return the status of `python -m service check`."""
        line = [sys.executable, "-m", "service", "check"]
        return subprocess.run(line, cwd=ROOT, env=self.environment, capture_output=True).returncode

    def workers(self) -> list[str]:
        return [name for name in self.children if name.startswith("worker")]

    def consumers(self) -> dict[str, tuple[str, int]]:
        """Return each live worker's consumer name and the number of pictures it has in progress."""
        names = {child.process.pid: name for name, child in self.children.items()}
        found = {}
        with contextlib.suppress(ResponseError):  # no worker has created the stream's group yet
            for one in self.connection.xpending(keys.pictures(self.digest), GROUP)["consumers"]:
                consumer = one["name"]
                if about := self.connection.get(keys.old_worker(consumer)):  # which both releases write
                    found[names.get(json.loads(about)["pid"], "a former worker")] = (consumer, int(one["pending"]))
        return found

    def in_progress(self) -> dict[str, int]:
        """Return the number of pictures in progress at each worker process."""
        return {name: pending for name, (_, pending) in self.consumers().items()}

    def claims(self) -> list[tuple[str, str, int]]:
        """Return the pictures in progress: entry, worker process, and how often it was delivered."""
        names = {consumer: name for name, (consumer, _) in self.consumers().items()}
        found: Any = self.connection.xpending_range(keys.pictures(self.digest), GROUP, "-", "+", 100)
        return [(one["message_id"], names.get(one["consumer"], ""), int(one["times_delivered"])) for one in found]

    def pending(self, consumer: str) -> int:
        """Return the number of pictures in progress at a worker, given its consumer name."""
        found = self.connection.xpending(keys.pictures(self.digest), GROUP)["consumers"]
        return sum(int(one["pending"]) for one in found if one["name"] == consumer)

    def requests_in_work(self) -> int:
        """Return how many requests and streams the API has in progress, this question included."""
        metrics = httpx.get(f"{self.address}/metrics", timeout=30).raise_for_status().text
        found = re.search(r"^labelgrid_http_requests_in_work (\d+)", metrics, re.MULTILINE)
        assert found is not None
        return int(found[1])


Beside = Callable[[Stack], contextlib.AbstractContextManager[Any]]  # what it needs beside a service, from its start on


@contextlib.contextmanager
def running(
    workers: int, worker_command: str, environment: Mapping[str, str], clocks: bool, beside: Beside, keep_logs: Path
) -> Iterator[Stack]:
    """Run a ready service in a temporary folder, of which only the logs are kept."""
    with tempfile.TemporaryDirectory(prefix="lg-faults-") as folder, contextlib.ExitStack() as cleanup:
        stack = Stack(Path(folder), environment, clocks)
        try:
            stack.beside = cleanup.enter_context(beside(stack))
            stack.start(workers, worker_command)
            yield stack
        finally:
            stack.stop()
            keep_logs.mkdir(parents=True, exist_ok=True)
            for log in Path(folder).rglob("*.log"):
                shutil.copy(log, keep_logs)
