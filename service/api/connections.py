"""HTTP connections. Closes those whose client sends too slowly, or headers without end: they cost memory without a key.
And those whose client does not read its answer, which is in memory until then.

Builds on uvicorn's protocol, whose only limit is for idle connections between two requests. Also sends a response's
headers with its body, and keeps the body of a request that asks for another protocol.
"""

from asyncio import AbstractEventLoop, BaseTransport, TimerHandle
from typing import Any, ClassVar

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_S = 10.0  # from the connection, or the first byte of its next request, to the end of the headers
BODY_S = 300.0  # from there to the end of the body: the longest form takes this at 60 KB/s
READ_S = 300.0  # for the client to read what has been written: the longest answer takes this at 100 KB/s
MOST_UNREAD = 64 << 20  # bytes of answers that the clients of one owner have not read
MAX_HEADER_BYTES = 1 << 16  # of all headers, or of what follows the body; besides the first part that was received


class JoinedWrites:
    """A transport that sends a response's headers together with the start of its body. uvicorn writes them in turn."""

    def __init__(self, transport: Any, loop: AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held = b""  # headers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held and data.endswith(b"\r\n\r\n"):
            self._held = data
            self._loop.call_soon(self._write_held)  # unless the body comes at once
        else:
            self._write_held(data)

    def close(self) -> None:
        self._write_held()
        self._transport.close()

    def _write_held(self, more: bytes = b"") -> None:
        data, self._held = self._held + more, b""
        if data and not self._transport.is_closing():  # uvloop's transports raise once the client is gone
            self._transport.write(data)


class WithoutUpgrades:
    """A parser that reads a request for another protocol, as Java's clients ask for HTTP/2, again without that.

    httptools sees no body in it, and uvicorn would take what follows for the next request.
    """

    def __init__(self, protocol: "PunctualProtocol") -> None:
        self._protocol, self._parser = protocol, _parser(protocol)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except HttpParserUpgrade as upgrade:
                data = self._protocol.without_upgrade() + data[upgrade.args[0] :]
                self._parser = _parser(self._protocol)  # the other one may take this request for the last
            else:
                break


def _parser(protocol: "PunctualProtocol") -> HttpRequestParser:
    parser = HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
    return parser


class PunctualProtocol(HttpToolsProtocol):
    """HTTP with deadlines for headers, body and reading the answer, and limits for headers and unread answers.

    Fields after a body (trailers) are dropped: uvicorn adds them to the headers, as if they had been there before.
    """

    unread: ClassVar[dict["PunctualProtocol", str]] = {}  # those that wait for their client to read, by time -> owner

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._read_deadline: TimerHandle | None = None
        self.parser = WithoutUpgrades(self)  # type: ignore[assignment]
        self._deadline: TimerHandle | None = None
        self._header_bytes = 0  # about how many the parser has received since it last returned something
        self._in_headers = False

    def _expect(self, within_s: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if within_s is None else self.loop.call_later(within_s, self.transport.close)

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(JoinedWrites(transport, self.loop))  # type: ignore[arg-type]
        self._expect(HEADER_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._has_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More has been written than the client has read."""
        super().pause_writing()
        self._read_deadline = self.loop.call_later(READ_S, self.transport.abort)
        state: Any = self.cycle.scope["state"] if self.cycle else {}  # no cycle: the request is not valid
        owner = self.unread[self] = state.get("owner", "")
        waiting = [one for one, other in self.unread.items() if other == owner]
        sizes = [one.transport.get_write_buffer_size() for one in waiting]
        while sum(sizes) > MOST_UNREAD:
            waiting.pop(0).transport.abort()
            sizes.pop(0)

    def resume_writing(self) -> None:
        self._has_read()
        super().resume_writing()

    def _has_read(self) -> None:
        self.unread.pop(self, None)
        if self._read_deadline is not None:
            self._read_deadline.cancel()

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"more than {MAX_HEADER_BYTES} bytes of headers")

    def on_message_begin(self) -> None:
        self._expect(HEADER_S)
        self._header_bytes, self._in_headers = 0, True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)

    def without_upgrade(self) -> bytes:
        """Return the request's headers without Upgrade."""
        first = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([first, *kept, b"", b""])

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")  # which is answered with 400
        if self.parser.should_upgrade():
            return
        self._expect(BODY_S)
        self._header_bytes, self._in_headers = 0, False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._expect(None)
        self._header_bytes = 0
        super().on_message_complete()
