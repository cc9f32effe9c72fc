"""Time passes in Redis: times to live and leases become older, since its clock cannot be moved."""

from redis import Redis

from service.store import keys
from service.store.claims import GROUP

MINUTE_S = 60

AGE = """
local by_ms, streams, group = tonumber(ARGV[1]), ARGV[2], ARGV[3]
for _, key in ipairs(redis.call('KEYS', '*')) do
  local ttl_ms = redis.call('PTTL', key)
  if ttl_ms >= 0 then
    redis.call('PEXPIRE', key, ttl_ms - by_ms)  -- one in the past removes it
  end
end
for _, key in ipairs(redis.call('KEYS', streams)) do
  for _, pending in ipairs(redis.call('XPENDING', key, group, '-', '+', 1000)) do
    local entry, consumer, idle_ms = pending[1], pending[2], pending[3]
    redis.call('XCLAIM', key, group, consumer, 0, entry, 'IDLE', idle_ms + by_ms, 'JUSTID')
  end
end
"""


def age(connection: Redis, seconds: int) -> None:
    connection.eval(AGE, 0, 1000 * seconds, keys.pictures("*"), GROUP)
