"""The time by Redis's clock, for the event loop. Jobs are dated and forgotten by it: a process's own may be wrong."""

import math
import time

from redis.asyncio import Redis

ASK_EVERY_S = 10.0  # in between, the monotonic clock counts on


class RedisClock:
    """Tells the time, in seconds since 1970."""

    def __init__(self, connection: Redis) -> None:
        self.connection = connection
        self._asked_at, self._began_at = -math.inf, 0.0  # in monotonic seconds; when the monotonic clock was 0

    async def now(self) -> float:
        if time.monotonic() - self._asked_at >= ASK_EVERY_S:
            seconds, microseconds = await self.connection.time()
            self._asked_at = time.monotonic()
            self._began_at = seconds + microseconds / 1e6 - self._asked_at
        return self._began_at + time.monotonic()
