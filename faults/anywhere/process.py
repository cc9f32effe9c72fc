"""Processes of the service whose boundaries fail as they are ordered, forked from one that has all modules loaded.

`python -m faults.anywhere.process` reads a request a line: arguments of `python -m service`, environment and log. It
answers with the process id of the fork that serves it: importing torch takes longer than a trial. Waits that are long
by design are short in the forks.
"""

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faults.anywhere import lines
from faults.anywhere.boundaries import Boundaries
from faults.anywhere.orders import OrderBook
from service.local.redis_server import die_with_parent

ROOT = Path(__file__).parents[2]
FOLDER = "ANYWHERE"  # the variable with the folder of orders
LINES = (
    "service.worker.runner",
    "service.worker.storer",
    "service.worker.job_files",
    "service.worker.process",
    "service.store.hub",
)
# So that a trial, which may take half a second, reaches what takes place now and then.
SHORTENED: dict[str, dict[str, float]] = {
    "service.api.app": {"STORAGE_EVERY_S": 0.0},
    "service.settings": {"HEARTBEATS": 30},
    "service.store.hub": {"RECONNECT_S": 0.2},
    "service.webhooks.sender": {"LEASE_S": 3.0, "LOOK_S": 0.2, "BACKOFF_S": 0.2},
    "service.worker.job_files": {"RETRY_S": 0.2},
    "service.worker.models": {"IDLE_MODEL_S": 0.3},  # so that each trial loads the other model and the evaluator
    "service.worker.process": {"PRUNE_EVERY_S": 0.1, "CLEAN_EVERY_S": 1},
    "service.worker.runner": {"CHECK_EVERY_S": 0.2, "OTHERS_FIRST_S": 0.1, "RETRY_S": 1.0, "LIVE_EVERY_S": 0.02},
}
VICTIMS = {"victim": "beefbeef", "upload": "feedfeed"}  # request id -> the end of the job's id


class Forked:
    """A forked process, with the methods of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Return 0 once it has ended, whatever its status."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return 0

    def _ended(self, timeout: float | None) -> int | None:
        if self._descriptor >= 0 and select.select([self._descriptor], [], [], timeout)[0]:
            os.close(self._descriptor)
            self._descriptor = -1
        return 0 if self._descriptor < 0 else None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts processes of the service by forking one. It ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.anywhere.process"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )

    def start(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps({"arguments": arguments, "environment": dict(environment), "log": str(log)})
        with self._lock:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            return Forked(int(self._process.stdout.readline()))

    def close(self) -> None:
        with self._process:  # closes its pipes
            self._process.kill()


def mark_ids() -> None:
    """End the ids of a trial's victims in a mark, by which every call that concerns them is known."""
    submit = importlib.import_module("service.api.submit")
    new_job_id, request_id = submit.new_job_id, submit.request_id

    def marked(created_at: float) -> str:
        found: str = new_job_id(created_at)
        mark = VICTIMS.get(request_id(), "")
        return found[: len(found) - len(mark)] + mark

    submit.new_job_id = marked  # type: ignore[attr-defined]


def load() -> Boundaries:
    """Import all of the service, and wrap its boundaries."""
    boundaries = Boundaries()
    lines.watch(LINES, boundaries.line)
    boundaries.wrap_all()
    for module, values in SHORTENED.items():
        found = importlib.import_module(module)
        for name, value in values.items():
            if not hasattr(found, name):
                raise AttributeError(f"{module} has no {name} any more")
            setattr(found, name, value)
    mark_ids()
    for module in ("service.api.app", "service.api.server", "service.openai.routes", "service.__main__"):
        importlib.import_module(module)
    return boundaries


def main() -> None:
    boundaries = load()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no ended process remains
    for line in sys.stdin:
        request = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
            continue
        die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(descriptor, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        boundaries.obey(OrderBook(Path(os.environ[FOLDER])), role=request["arguments"][0])
        sys.argv = ["service", *request["arguments"]]
        sys.modules["service.__main__"].main()
        return


if __name__ == "__main__":
    main()
