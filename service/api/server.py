"""uvicorn, with a shutdown that answers what is in work and takes nothing more. Knows no routes."""

import asyncio
import socket
import time
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.problems import error_response
from service.contract.errors import ShuttingDown
from service.telemetry import tracing
from service.telemetry.logs import get_logger

log = get_logger(__name__)

GRACE_S = 3  # of the bound, for answers: longer than those who wait take to notice that they are to have one
CLOSE_S = 1  # for connections to close when the bound is over
LOOK_S = 0.05  # between two looks at what is left
STILL_ANSWERED = ("/healthz", "/metrics")  # it lives, and what it did is to be known
RETRY = {"Retry-After": "1", "Connection": "close"}
# Its lines go where ours go; of requests we have our own.
LOGGING: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}


class Server(uvicorn.Server):
    """Shuts down within `drain_s`: what comes new is refused, event streams end, all others get their answer."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, **LOGGING, timeout_graceful_shutdown=CLOSE_S, **options))
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        bound_s = max(self.app.state.settings.drain_s, GRACE_S)
        deadline = time.monotonic() + bound_s
        self.app.state.reader.stop(within_s=bound_s - GRACE_S)
        log.info("draining", requests=len(self.server_state.tasks), within_s=bound_s)
        while self.server_state.tasks and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
        log.info("drained", requests_left=len(self.server_state.tasks))
        await super().shutdown(sockets)
        tracing.stop()  # here, for uvicorn then lets the signal end the process


class RefuseWhileStopping:
    """ASGI middleware: once the shutdown has begun, what comes new is a 503 that says when to try again."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["app"].state.reader.stopping and scope["path"] not in STILL_ANSWERED:
            app = error_response(scope["path"], ShuttingDown(ShuttingDown.example, headers=RETRY))
        await app(scope, receive, send)
