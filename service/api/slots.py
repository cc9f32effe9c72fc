"""Limits what takes much memory or CPU time, such as zips and large pictures, to a few at a time. Knows no HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Slots:
    """A semaphore of which one owner has a part: nobody waits behind all that another has sent."""

    def __init__(self, count: int, of_one: int = 1) -> None:
        self._all, self._of_one = asyncio.Semaphore(count), of_one
        self._own = WeakValueDictionary[str, asyncio.Semaphore]()  # of owners who use a slot or wait for one

    @asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        own = self._own.setdefault(owner, asyncio.Semaphore(self._of_one))
        async with own, self._all:
            yield
