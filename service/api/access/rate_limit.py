"""Rate limits: requests of each owner, counted in Redis over a sliding window, for all API processes together.

Knows no HTTP.
"""

import math
import re
import time
from typing import Any

from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import Redis

from service.settings import StartError
from service.store import keys

LIMIT = re.compile(r"[1-9]\d{0,9} ?(/|per) ?([1-9]\d{0,3} ?)?(second|minute|hour|day|month|year)s?", re.IGNORECASE)


class BadLimit(StartError):
    """The configured limit cannot be read."""


def read_limit(limit: str) -> RateLimitItem | None:
    """Parse a limit such as "3000/minute"; the text none gives None. Raises BadLimit."""
    if limit == "none":
        return None
    if not LIMIT.fullmatch(limit.strip()):  # `parse` would drop a second limit, and take a period of 0 for 1
        raise BadLimit(f"LABELGRID_RATE_LIMIT is {limit!r}; wanted one limit such as 3000/minute, or none")
    return parse(limit)


class RateLimiter:
    """Counts the requests of each owner."""

    def __init__(self, connection: Redis, limit: RateLimitItem) -> None:
        self.limit = limit
        pool: Any = connection.connection_pool
        options = {"implementation": "redispy", "connection_pool": pool, "key_prefix": f"{keys.PREFIX}:rate"}
        self._limiter = SlidingWindowCounterRateLimiter(RedisStorage("async+redis://", **options))

    async def wait_s(self, owner: str) -> int | None:
        """Count a request. Return None if it may pass, otherwise the seconds to wait."""
        if await self._limiter.hit(self.limit, owner):
            return None
        stats = await self._limiter.get_window_stats(self.limit, owner)
        return max(1, math.ceil(stats.reset_time - time.time()))
