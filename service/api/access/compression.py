"""Compresses the large answers in JSON, which the page waits for. Pictures are compressed already."""

from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

COMPRESSED = frozenset({"/models", "/openapi.json"})
LEVEL = 1  # a seventh of the bytes in 2 ms; the best level saves another third in 14 ms, in which nobody is answered


class Compression:
    """ASGI middleware: gzip at these addresses for clients that accept it. All others cost one look at a set."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.compressing = app, GZipMiddleware(app, compresslevel=LEVEL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.compressing if scope.get("path") in COMPRESSED else self.app
        await app(scope, receive, send)
