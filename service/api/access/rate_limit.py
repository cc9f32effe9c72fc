"""Rate limits: requests of each owner, counted in Redis over a sliding window, for all API processes together.

Knows no HTTP.
"""

import math
import re
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
        self._storage = RedisStorage("async+redis://", **options)
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    async def wait_s(self, owner: str, cost: int = 1, counted: int = 0) -> int | None:
        """Count a request as `cost` of them, of which `counted` are counted already.

        Return None if it may pass; otherwise the seconds to wait, and count no more.
        """
        cost = min(cost, self.limit.amount)
        if cost <= counted or await self._limiter.hit(self.limit, owner, cost=cost - counted):
            return None
        key, window_s = self.limit.key_for(owner), self.limit.get_expiry()
        before, before_s, now, now_s = await self._storage.get_sliding_window(key, window_s)
        below = self.limit.amount - cost + 1  # the request passes once fewer than so many count
        if now >= below:  # only once this window has become the one before, whose requests count for less and less
            wait_s = now_s - window_s * below / now
        else:
            wait_s = before_s - window_s * (below - now) / max(before, 1)
        return max(1, math.ceil(wait_s))
