"""Closes connections whose client sends too slowly: each occupies a file descriptor and memory, but no key is needed.

Builds on uvicorn's protocol, whose only limit is for idle connections between two requests.
"""

from asyncio import BaseTransport, TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_S = 10.0  # from the connection, or the first byte of its next request, to the end of the headers
BODY_S = 300.0  # from there to the end of the body: the longest form takes this at 60 KB/s


class PunctualProtocol(HttpToolsProtocol):
    """HTTP with a deadline for headers and body. The response has none here."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline: TimerHandle | None = None

    def _expect(self, within_s: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if within_s is None else self.loop.call_later(within_s, self.transport.close)

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._expect(HEADER_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._expect(HEADER_S)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._expect(BODY_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._expect(None)
        super().on_message_complete()
