"""Time passes in Redis: times to live and leases become older, since its clock cannot be moved."""

from typing import Any

from redis import Redis

from service.store import keys
from service.store.claims import GROUP

MINUTE_S = 60


def age(connection: Redis, seconds: int) -> None:
    for key in connection.scan_iter(count=1000):
        if (ttl_ms := connection.pttl(key)) >= 0:
            connection.pexpire(key, ttl_ms - 1000 * seconds)  # one in the past removes it
    for key in connection.scan_iter(keys.stream("*"), count=1000):
        pending: Any = connection.xpending_range(key, GROUP, "-", "+", count=1000)
        for one in pending:
            idle_ms = one["time_since_delivered"] + 1000 * seconds
            connection.xclaim(key, GROUP, one["consumer"], 0, [one["message_id"]], idle=idle_ms, justid=True)
