"""Time passes in Redis: everything in it becomes older, since its clock cannot be moved."""

from typing import Any

from redis import Redis

from service.store import keys
from service.store.claims import GROUP

MINUTE_S = 60


def age(connection: Redis, seconds: int) -> None:
    """Make all times to live, leases, deadlines and other stored times older by some whole minutes."""
    assert seconds % MINUTE_S == 0  # some times are stored as minutes
    for key in connection.scan_iter(count=1000):
        if (ttl_ms := connection.pttl(key)) >= 0:
            connection.pexpire(key, ttl_ms - 1000 * seconds)  # one in the past removes it
    _jobs(connection, seconds)
    for key in connection.scan_iter(keys.stream("*")):
        _leases(connection, key, seconds)
    for key in connection.scan_iter(keys.stored_bytes("*")):
        ttl_ms, before = connection.pttl(key), connection.hgetall(key)
        connection.delete(key)
        connection.hset(key, mapping=dict(_older(name, value, seconds) for name, value in before.items()))
        connection.pexpire(key, ttl_ms)
    for key in connection.scan_iter(keys.index("*")):
        ttl_ms, members = connection.pttl(key), [raw.split(b"-") for raw in connection.zrange(key, 0, -1)]
        connection.delete(key)
        connection.zadd(key, {b"%013d-%s" % (int(ms) - 1000 * seconds, job_id): 0 for ms, job_id in members})
        connection.pexpire(key, ttl_ms)


def _older(name: bytes, value: bytes, seconds: int) -> tuple[bytes, bytes]:
    expires, rest = value.split(b" ", 1)
    minute = b"%d" % (int(name) - seconds // MINUTE_S) if name.isdigit() else name  # of ended jobs
    return minute, b"%d %s" % (int(expires) - seconds, rest)


def _jobs(connection: Redis, seconds: int) -> None:
    for key in connection.scan_iter(keys.job("*")):
        if key.count(b":") == 2:
            for name, by in (("overdue_at", seconds), ("bytes_minute", seconds // MINUTE_S)):
                if connection.hexists(key, name):
                    connection.hincrby(key, name, -by)


def _leases(connection: Redis, key: bytes, seconds: int) -> None:
    pending: Any = connection.xpending_range(key, GROUP, "-", "+", count=1000)
    for one in pending:
        idle_ms = one["time_since_delivered"] + 1000 * seconds
        who, entry = one["consumer"], one["message_id"]
        connection.xclaim(key, GROUP, who, 0, [entry], idle=idle_ms, justid=True)
