"""uvicorn with a shutdown that answers the requests in progress. `access/guard.py` refuses new ones meanwhile."""

import asyncio
import contextlib
import ctypes
import resource
import socket
import time
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.api.connections import PunctualProtocol
from service.telemetry import tracing
from service.telemetry.logs import get_logger

log = get_logger(__name__)

GRACE_S = 3.0  # the last part of `drain_s`, in which the requests that still wait are answered
CLOSE_S = 1  # for connections to close after that
TICK_S = 0.5  # so soon a signal is noticed
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # mallopt(3)
LARGE_BLOCK = 1 << 20  # bytes
LOOK_S = 0.05  # between two checks for requests in progress
# uvicorn logs through our handlers, and leaves the line for each request to ObserveRequests.
LOGGING: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}


def _allow_open_files() -> None:
    """Raise this process's limit of open files as far as it may: each client takes one, each watched job another.

    Systems set the limit that counts to 1024, with which one client's streams of events would shut out all others.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS names a limit that it does not take
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _return_memory() -> None:
    """Let the C library (glibc) give large blocks back at once, and keep two heaps instead of eight for each core.

    Otherwise what threads have used for pictures and zips stays with the process: 150 MB more after a few zips.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, 2)
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


class Server(uvicorn.Server):
    """Shuts down within `drain_s`: refuses new requests, ends event streams, and answers all others."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        options = {**LOGGING, "http": PunctualProtocol, "ws": "none", "timeout_graceful_shutdown": CLOSE_S, **options}
        super().__init__(uvicorn.Config(app, **options))
        self.app = app

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        _allow_open_files()
        _return_memory()
        super().run(sockets)

    async def main_loop(self) -> None:
        """Wait for a signal, as uvicorn's does ten times a second: most of the CPU time of an API without requests."""
        tenths = 0
        while not await self.on_tick(tenths):
            await asyncio.sleep(TICK_S)
            tenths += round(10 * TICK_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        bound_s = max(self.app.state.settings.drain_s, GRACE_S)
        deadline = time.monotonic() + bound_s
        self.app.state.reader.stop(within_s=bound_s - GRACE_S)
        log.info("draining", requests=len(self.server_state.tasks), within_s=bound_s)
        while self.server_state.tasks and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
        log.info("drained", requests_left=len(self.server_state.tasks))
        await super().shutdown(sockets)
        tracing.stop()  # here, because uvicorn then raises the signal again, which ends the process
