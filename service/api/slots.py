"""Limits what takes much memory or CPU time, such as zips and scaled pictures, to a few at a time. Knows no HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Slots:
    """A semaphore of which one owner has a single slot: nobody waits behind all that another has sent."""

    def __init__(self, count: int) -> None:
        self._all = asyncio.Semaphore(count)
        self._own = WeakValueDictionary[str, asyncio.Lock]()  # of owners who use a slot or wait for one

    @asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        own = self._own.setdefault(owner, asyncio.Lock())
        async with own, self._all:
            yield
