"""The functions of `jobs.lua`: how they come into Redis and are called, with `call` by code that may block, and with a
`Pipeline` by the event loop. Knows no keys and no jobs.
"""

import asyncio
import contextlib
import hashlib
import math
import time
from pathlib import Path
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ResponseError

from service.store.connection import best_effort

_FILE = Path(__file__).with_name("jobs.lua").read_text()
# Two versions of the service, side by side in one Redis, each call their own functions.
VERSION = hashlib.sha256(_FILE.encode()).hexdigest()[:12]
LIBRARY = f"labelgrid_{VERSION}"
SOURCE = _FILE.replace("name=labelgrid\n", f"name={LIBRARY}\n", 1).replace("'development'", f"'{VERSION}'", 1)

CLOCK_EVERY_S = 10.0  # between two looks at Redis's clock the monotonic clock counts on
Command = tuple[Any, ...]  # of Redis, with its arguments


def call(connection: Redis, function: str, *arguments: Any) -> Any:
    """Call a function and return its answer. Load the library first if Redis does not have it."""
    try:
        return connection.fcall(f"{LIBRARY}_{function}", 0, *arguments)
    except ResponseError as error:
        if not is_missing(error):
            raise
    connection.function_load(SOURCE, replace=True)  # which a full Redis refuses
    return connection.fcall(f"{LIBRARY}_{function}", 0, *arguments)


def is_missing(error: ResponseError) -> bool:
    """Whether Redis does not have the function: it is new, was emptied by FUNCTION FLUSH, or lost its last writes."""
    return "Function not found" in str(error)


def remove_former(connection: Redis) -> None:
    """Remove the libraries of other versions of the service, each less than 0.1 MB, which would stay for ever.

    A process of another version that still runs loads its own again with its next call. A full Redis would refuse that,
    so nothing is removed unless it takes ours.
    """
    with best_effort():
        connection.function_load(SOURCE, replace=True)
        found: Any = connection.function_list("labelgrid_*")
        for name in {str(library[1]) for library in found} - {LIBRARY}:
            with contextlib.suppress(ResponseError):  # another worker, which starts as well, was faster
                connection.function_delete(name)


class Pipeline:
    """Sends the commands that one turn of the event loop asks for together (auto-pipelining)."""

    def __init__(self, connection: AsyncRedis) -> None:
        self.connection = connection
        self._unsent = list[Command]()
        self._sending: asyncio.Task[list[Any]] | None = None  # sends them, after the requests that have arrived
        self._clock_read_at = -math.inf  # in monotonic seconds
        self._clock_began_at = 0.0  # when the monotonic clock was 0

    async def ask(self, *commands: Command) -> list[Any]:
        """Return the answers to commands. Raises RedisError: the first error among the answers, or that of them all."""
        first, sending = len(self._unsent), self._sending
        self._unsent += commands
        if sending is None:
            sending = self._sending = asyncio.create_task(self._send())
        answers = (await asyncio.shield(sending))[first : first + len(commands)]  # others wait for it, too
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def _send(self) -> list[Any]:
        commands, self._unsent, self._sending = self._unsent, [], None
        pipe = self.connection.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return await pipe.execute(raise_on_error=False)

    async def __call__(self, *command: Any) -> Any:
        """Return the answer to a command. Raises RedisError."""
        (answer,) = await self.ask(command)
        return answer

    async def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of `jobs.lua`. Load the library first if Redis does not have it."""
        command = ("FCALL", f"{LIBRARY}_{function}", 0, *arguments)
        try:
            return await self(*command)
        except ResponseError as error:
            if not is_missing(error):
                raise
        await self("FUNCTION LOAD", "REPLACE", SOURCE)
        return await self(*command)

    async def now(self) -> float:
        """Return the time by Redis's clock, in seconds since 1970. Jobs are dated by it: ours may be wrong."""
        if time.monotonic() - self._clock_read_at >= CLOCK_EVERY_S:
            seconds, microseconds = await self("TIME")
            self._clock_read_at = time.monotonic()
            self._clock_began_at = seconds + microseconds / 1e6 - self._clock_read_at
        return self._clock_began_at + time.monotonic()
