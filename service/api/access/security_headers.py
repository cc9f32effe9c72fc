"""Headers that restrict what browsers do with an answer: it is no page and cannot be framed.

A route that serves a page sets its own content policy.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DEFAULTS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-store",  # jobs are private to their owners
}
ENCODED = [(name.lower().encode(), value.encode()) for name, value in DEFAULTS.items()]  # as ASGI has headers


class SecurityHeaders:
    """ASGI middleware: adds the headers that an answer does not have."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                given = {name for name, _ in headers}
                message["headers"] = headers + [header for header in ENCODED if header[0] not in given]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
