"""The service under soak: two APIs, which send webhooks, and two workers, with short lifetimes in Redis."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

from faults.cases.edits import publish
from faults.harness import Stack
from service.api.access.api_keys import hash_of, new_key
from service.local.demo import free_port
from service.store.connection import connect

OWNERS = {name: new_key() for name in ("red", "blue")}
KEEP_S = 60
JOB_TIMEOUT_S = 240
ENVIRONMENT = {
    "LABELGRID_API_KEYS": " ".join(f"{name}:{hash_of(key)}" for name, key in OWNERS.items()),
    "LABELGRID_WEBHOOK_SECRET": "soak" * 8,
    "LABELGRID_WEBHOOK_ALLOW_PRIVATE": "1",
    "LABELGRID_KEEP_DAYS": str(KEEP_S / 86_400),
    "LABELGRID_JOB_TIMEOUT_S": str(JOB_TIMEOUT_S),
}


class SoakStack(Stack):
    """A service whose `spare api` and `worker 1` are never killed, so that their memory is one long series."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ENVIRONMENT, clocks=False)
        self.spare_port = free_port()

    @property
    def addresses(self) -> tuple[str, str]:
        return self.address, f"http://127.0.0.1:{self.spare_port}"

    def run(self, name: str, command: str, **environment: str) -> None:
        super().run(name, command, **environment)
        if name == "api":
            super().run("spare api", f"service api --port {self.spare_port}")

    def _start_redis(self) -> subprocess.Popen[bytes]:
        process = super()._start_redis()
        with connect(self.redis.url) as connection:
            # With `everysec` a kill may lose the last writes while a busy disk syncs the ones before.
            connection.config_set("appendfsync", "always")
        return process


@contextmanager
def running(keep_logs: Path) -> Iterator[SoakStack]:
    """Run a ready service in a temporary folder, of which only the logs are kept."""
    with TemporaryDirectory(prefix="lg-soak-") as folder:
        stack = SoakStack(Path(folder))
        publish(stack)
        try:
            stack.start(2, "service worker")
            yield stack
        finally:
            stack.stop()
            keep_logs.mkdir(parents=True, exist_ok=True)
            for log in Path(folder).rglob("*.log"):
                copy(log, keep_logs)
