"""Whether a new job fits: into its model's queue, and into what its owner may store. Knows no HTTP.

The script that creates a job checks it first, so that simultaneous requests cannot pass a limit together.
"""

from dataclasses import dataclass
from typing import Any

from service.settings import Settings
from service.store import keys

# Parts of the scripts that create, end and delete jobs. Bytes are counted for owners of API keys only: without keys
# nothing limits them.
# Before a job is created: ends the script if something is full, with "queue", "owner" or "bytes", how much of it is
# taken, and for bytes the seconds until some of it expires. An empty queue or store takes any one job, of which no more
# than its owner's share counts for the others: one large request would close the queue to them.
ADMIT = """
local queued, own, share = redis.call('XLEN', stream), 0, tonumber(most_own)
if share == 0 then share = math.huge end
local pending_counts = redis.call('HGETALL', counts)
for i = 1, #pending_counts, 2 do
  local count = tonumber(pending_counts[i + 1])
  if pending_counts[i] == owner then own = count end
  queued = queued + math.min(count, share)
end
if queued > 0 and queued + total > tonumber(most_queued) then return {'queue', queued, 0} end
if own > 0 and own + total > share then return {'owner', own, 0} end
local bytes, first, expired = 0, now + 3600, {}
local all_stored = owner ~= '' and redis.call('HGETALL', stored) or {}
for i = 1, #all_stored, 2 do
  local expires, size = string.match(all_stored[i + 1], '(%d+) (%-?%d+)')
  if tonumber(expires) <= now then
    table.insert(expired, all_stored[i])
  else
    bytes, first = bytes + size, math.min(first, tonumber(expires))
  end
end
if tonumber(most_bytes) > 0 and bytes > 0 and bytes + expected > tonumber(most_bytes) then
  return {'bytes', bytes, first - now}
end
"""
# When a job is created: it counts with its expected bytes until its end.
COUNT_EXPECTED = """
if owner ~= '' then
  redis.call('HSET', stored, id, (now + lifetime_s) .. ' ' .. expected)
  redis.call('EXPIRE', stored, lifetime_s)
end
for _, field in ipairs(expired) do redis.call('HDEL', stored, field) end
"""
# At a job's end: what was expected becomes what is stored, summed up by the minute in which it expires. The record
# counts, since a job that is cancelled at once has nothing else.
COUNT_STORED = f"""
if owner and owner ~= '' then
  local of_owner, now = '{keys.BYTES_PREFIX}' .. owner, redis.call('TIME')[1]
  local minute, size = math.ceil((now + ttl_s) / 60), (bytes or 0) + grid_bytes + #record
  redis.call('HDEL', of_owner, id)
  local before = string.match(redis.call('HGET', of_owner, minute) or '0 0', ' (%-?%d+)')
  redis.call('HSET', of_owner, minute, minute * 60 .. ' ' .. before + size)
  if redis.call('TTL', of_owner) < minute * 60 - now then redis.call('EXPIREAT', of_owner, minute * 60) end
  redis.call('HSET', job, 'bytes', size, 'bytes_minute', minute)
end
"""
# When an ended job is deleted (KEYS[1] is the job).
UNCOUNT_STORED = f"""
local about = redis.call('HMGET', KEYS[1], 'owner', 'bytes', 'bytes_minute')
local of_owner = '{keys.BYTES_PREFIX}' .. (about[1] or '')
local before = about[3] and string.match(redis.call('HGET', of_owner, about[3]) or '', ' (%-?%d+)')
if before then redis.call('HSET', of_owner, about[3], about[3] * 60 .. ' ' .. before - (about[2] or 0)) end
"""


@dataclass(frozen=True)
class Full:
    """Why a job does not fit. `what`: the model's "queue", the "owner"'s part of it, or the owner's "bytes".

    `taken`: how much of it there is, `most` the limit; `expires_s`: until some stored bytes expire.
    """

    what: str
    taken: int
    most: int
    expires_s: int


class NoRoom(Exception):
    """A job does not fit; `full` says why."""

    def __init__(self, full: Full) -> None:
        super().__init__(full)
        self.full = full


def limits(settings: Settings) -> dict[str, int]:
    """Return the most that fits, by what may be full; 0 is no limit."""
    own = {"owner": settings.max_queued_pictures_per_owner, "bytes": settings.max_stored_bytes_per_owner}
    return {"queue": settings.max_queued_pictures, **(own if settings.has_keys else dict.fromkeys(own, 0))}


def full_of(settings: Settings, answer: list[Any]) -> Full:
    """Return why a job does not fit, given the answer of the script."""
    what, taken, expires_s = answer
    return Full(what.decode(), int(taken), limits(settings)[what.decode()], int(expires_s))
