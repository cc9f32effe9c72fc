"""uvicorn, with a shutdown that does not wait for a job's end. Knows no routes."""

import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

GRACE_S = 3  # for requests in work at a shutdown; longer than waiters take to notice it

# Its lines go where ours go; of requests we have our own.
LOGGING: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}


class Server(uvicorn.Server):
    """Tells event streams and requests that wait for a job to end; uvicorn itself would wait for them."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, **LOGGING, timeout_graceful_shutdown=GRACE_S, **options))
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.reader.stopping = True
        await super().shutdown(sockets)
