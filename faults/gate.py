"""A TCP proxy that can stall or slow down what passes, as a network or a storage server does. Knows no protocol."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path


class Gate:
    """Forwards connections from `port` to `target`, a port or socket of this machine.

    Closed, it keeps them and passes nothing on.
    """

    def __init__(self, target: int | Path) -> None:
        self.target, self.port = target, 0
        self.delay_s = 0.0  # of each part of a request
        self._loop: asyncio.AbstractEventLoop
        self._is_open, self._is_over = asyncio.Event(), asyncio.Event()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._is_open.clear)

    def open(self) -> None:
        self._loop.call_soon_threadsafe(self._is_open.set)

    def freeze(self) -> None:
        """Keep the connections that are open now, and pass nothing on for them any more. New ones work."""
        self._loop.call_soon_threadsafe(self._freeze)

    def _freeze(self) -> None:
        self._is_open.clear()
        self._is_open = asyncio.Event()
        self._is_open.set()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_open = self._is_open
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled at the end
            if isinstance(self.target, Path):
                from_target, to_target = await asyncio.open_unix_connection(self.target)
            else:
                from_target, to_target = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(
                self._pass(reader, to_target, is_open, is_request=True),
                self._pass(from_target, writer, is_open, is_request=False),
            )

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_open: asyncio.Event, is_request: bool
    ) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.delay_s if is_request else 0)
                await is_open.wait()
                writer.write(data)
                await writer.drain()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_open.set()
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        await self._is_over.wait()
        server.close()


@contextlib.contextmanager
def gate(target: int | Path) -> Iterator[Gate]:
    """Run an open gate in a thread."""
    one = Gate(target)
    thread = threading.Thread(target=asyncio.run, args=(one._serve(),), name="gate", daemon=True)
    thread.start()
    while not one.port:
        thread.join(0.01)
    yield one
    one._loop.call_soon_threadsafe(one._is_over.set)
    thread.join()
