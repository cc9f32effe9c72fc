"""uvicorn, told when it stops, so that streams end and those who wait are answered in time."""

import contextlib
import math
import resource
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.telemetry.logs import get_logger

log = get_logger(__name__)

HEADERS_BYTES = 64 << 10  # of a request; h11 itself takes 16 KiB of headers that a network delivers in parts
GRACE_S = 3.0  # the last part of `drain_s`, in which the requests that still wait are answered


class Server(uvicorn.Server):
    """Answers the requests in progress within `drain_s` of a signal. uvicorn itself closes all other connections."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        self.app, self.drain_s = app, max(app.state.settings.drain_s, GRACE_S)
        # h11 reads a request that offers to change to HTTP/2, as Java's clients send, and ignores fields after a body;
        # with httptools uvicorn loses the one's body and takes the others for headers. uvicorn logs through our
        # handlers, and leaves the line for each request to ObserveRequests.
        options = {
            "http": "h11",
            "h11_max_incomplete_event_size": HEADERS_BYTES,
            "ws": "none",
            "log_config": None,
            "log_level": "error",
            "access_log": False,
            **options,
        }
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=math.ceil(self.drain_s), **options))

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        # Each client takes an open file, each watched job another. Systems set the limit that counts to 1024.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # macOS names a limit that it does not take
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        super().run(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("draining", requests=len(self.server_state.tasks), within_s=self.drain_s)
        self.app.state.service.jobs.hub.stop(within_s=self.drain_s - GRACE_S)
        await super().shutdown(sockets)
