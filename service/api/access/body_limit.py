"""Limits the size of request bodies."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: reading a body of more than `limit` bytes, announced or not, raises a 413.

    Forms may have `form_limit` bytes, because they contain pictures. The route passes the HTTPException on, so that it
    becomes a problem as any other error.
    """

    def __init__(self, app: ASGIApp, limit: int, form_limit: int) -> None:
        self.app, self.limit, self.form_limit = app, limit, form_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        limit = self.form_limit if is_form else self.limit
        announced = int(headers.get("content-length", 0))  # the HTTP server refuses other values
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if max(received, announced) > limit:
                raise HTTPException(413, f"the body has more than {limit} bytes", {"Connection": "close"})
            return message

        await self.app(scope, limited_receive, send)
