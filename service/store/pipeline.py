"""Redis for the event loop: what requests ask for at the same time goes in one message. Knows no keys and no jobs."""

import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from service.store import functions

CLOCK_EVERY_S = 10.0  # between two looks at Redis's clock the monotonic clock counts on

Command = tuple[Any, ...]  # of Redis, with its arguments


class Pipeline:
    """Sends the commands that one turn of the event loop asks for together (auto-pipelining)."""

    def __init__(self, connection: Redis) -> None:
        self.connection = connection
        self._unsent = list[tuple[Sequence[Command], asyncio.Future[list[Any]]]]()
        self._tasks = set[asyncio.Task[None]]()  # keeps them alive
        self._clock_read_at = -math.inf  # in monotonic seconds
        self._clock_began_at = 0.0  # when the monotonic clock was 0

    async def ask(self, *commands: Command) -> list[Any]:
        """Return the answers to commands, of which some may be errors. Raises RedisError if there are no answers."""
        answers: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._unsent.append((commands, answers))
        if len(self._unsent) == 1:
            task = asyncio.create_task(self._send())  # runs after the requests that have arrived
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await answers

    async def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        pipe = self.connection.pipeline(transaction=False)
        for command in itertools.chain.from_iterable(commands for commands, _ in unsent):
            pipe.execute_command(*command)
        try:
            found = iter(await pipe.execute(raise_on_error=False))
        except (Exception, asyncio.CancelledError) as error:
            for _, answers in unsent:
                if not answers.done():  # otherwise its request was cancelled
                    answers.set_exception(error)
            return
        for commands, answers in unsent:
            of_request = list(itertools.islice(found, len(commands)))
            if not answers.done():
                answers.set_result(of_request)

    async def __call__(self, *command: Any) -> Any:
        """Return the answer to a command, or raise it if it is an error."""
        (answer,) = await self.ask(command)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of `jobs.lua`. Load the library first if Redis does not have it."""
        command = ("FCALL", f"{functions.LIBRARY}_{function}", 0, *arguments)
        (answer,) = await self.ask(command)
        if not isinstance(answer, Exception):
            return answer
        if not functions.is_missing(answer):
            raise answer
        await self("FUNCTION LOAD", "REPLACE", functions.SOURCE)
        return await self(*command)

    async def now(self) -> float:
        """Return the time by Redis's clock, in seconds since 1970. Jobs are dated by it: ours may be wrong."""
        if time.monotonic() - self._clock_read_at >= CLOCK_EVERY_S:
            seconds, microseconds = await self("TIME")
            self._clock_read_at = time.monotonic()
            self._clock_began_at = seconds + microseconds / 1e6 - self._clock_read_at
        return self._clock_began_at + time.monotonic()
