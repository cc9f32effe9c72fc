"""Limits what request bodies take: bytes, lists and objects in JSON, and all bodies of one owner together."""

from collections import Counter

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access.guard import charge
from shared.options import LIMITS

BYTES_A_REQUEST = 100_000  # of a body that takes as long as one usual request
LARGE_BODIES = 2  # of one owner at the same time, of the largest size


class BodyLimit:
    """ASGI middleware: reading a body that is too large, announced or not, raises a 413.

    Forms may have `form_limit` bytes, because they contain pictures; others `limit`. What the requests in progress of
    one owner have sent may be LARGE_BODIES times as much in all; beyond it there is a 429. The route passes the errors
    on, so that they become problems as any other error.
    """

    def __init__(self, app: ASGIApp, limit: int, form_limit: int) -> None:
        self.app, self.limit, self.form_limit = app, limit, form_limit
        self._held = Counter[str]()  # by owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        limit = self.form_limit if is_form else self.limit
        announced = int(headers.get("content-length", 0))  # the HTTP server refuses other values
        owner = scope.get("state", {}).get("owner", "")
        received = parts = 0

        async def limited_receive() -> Message:
            nonlocal received, parts
            message = await receive()
            body = message.get("body", b"")
            received += len(body)
            self._held[owner] += len(body)
            if max(received, announced) > limit:
                raise _too_large(f"the body has more than {limit} bytes")
            if not is_form:
                parts += body.count(b"[") + body.count(b"{")
            if parts > LIMITS.max_parts:  # before Python creates an object for each
                raise _too_large(f"the body has more than {LIMITS.max_parts} lists and objects")
            if self._held[owner] > LARGE_BODIES * self.form_limit:
                raise HTTPException(429, "your other requests are too large; try again", {"Retry-After": "1"})
            if message["type"] == "http.request" and not message.get("more_body"):
                await charge(scope, 1 + received // BYTES_A_REQUEST)
            return message

        try:
            await self.app(scope, limited_receive, send)
        finally:
            self._held[owner] -= received
            if not self._held[owner]:
                del self._held[owner]


def _too_large(detail: str) -> HTTPException:
    return HTTPException(413, detail, {"Connection": "close"})
