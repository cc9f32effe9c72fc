"""Whether a new job fits: into its model's queue, and into what its owner may store. Knows no HTTP.

A request that fits gets a reservation in the same script, so that simultaneous requests cannot pass together. Creating
the job replaces the reservation.
"""

from dataclasses import dataclass
from typing import Any

from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys

RESERVED_S = 10  # a reservation whose API process died expires

# Reserves room for a job, or says what is full: "", "queue", "owner" or "bytes", then how much of it is taken, and for
# bytes the seconds until some of it expires.
# KEYS: pending counts, stream, reservations, the owner's bytes. ARGV: job's id, owner, pictures, most pictures, most
# pending pictures of the owner or 0, bytes, most bytes of the owner or 0, seconds that a reservation lasts.
_RESERVE = """
local now, pictures = tonumber(redis.call('TIME')[1]), tonumber(ARGV[3])
local queued, own = redis.call('XLEN', KEYS[2]), 0
local pending = redis.call('HGETALL', KEYS[1])
for i = 1, #pending, 2 do
  queued = queued + pending[i + 1]
  if pending[i] == ARGV[2] then own = own + pending[i + 1] end
end
local reserved = redis.call('HGETALL', KEYS[3])
for i = 1, #reserved, 2 do
  local expires, count, owner = string.match(reserved[i + 1], '(%d+) (%d+) (.*)')
  if tonumber(expires) <= now then
    redis.call('HDEL', KEYS[3], reserved[i])
  else
    queued = queued + count
    if owner == ARGV[2] then own = own + count end
  end
end
if queued > 0 and queued + pictures > tonumber(ARGV[4]) then return {'queue', queued, 0} end
local most = tonumber(ARGV[5])
if most > 0 and own > 0 and own + pictures > most then return {'owner', own, 0} end
local bytes, first = 0, now + 3600
local stored = ARGV[2] ~= '' and redis.call('HGETALL', KEYS[4]) or {}
for i = 1, #stored, 2 do
  local expires, size = string.match(stored[i + 1], '(%d+) (%-?%d+)')
  if tonumber(expires) <= now then
    redis.call('HDEL', KEYS[4], stored[i])
  else
    bytes, first = bytes + size, math.min(first, tonumber(expires))
  end
end
most = tonumber(ARGV[7])
if most > 0 and bytes > 0 and bytes + tonumber(ARGV[6]) > most then return {'bytes', bytes, first - now} end
redis.call('HSET', KEYS[3], ARGV[1], (now + ARGV[8]) .. ' ' .. ARGV[3] .. ' ' .. ARGV[2])
redis.call('EXPIRE', KEYS[3], ARGV[8])
return {'', queued, 0}
"""

# Parts of the scripts of `jobs.py`. Bytes are counted for owners of API keys only: without keys nothing limits them.
# When a job is created: it replaces its reservation, and counts with its expected bytes until its end.
SETTLE = """
redis.call('HDEL', KEYS[8], id)
if owner ~= '' then
  redis.call('HSET', KEYS[9], id, (time[1] + ARGV[4]) .. ' ' .. ARGV[6])
  redis.call('EXPIRE', KEYS[9], ARGV[4])
end
"""
# At a job's end (KEYS[2] is the job, ARGV[1] its id, ARGV[3] its time to live, ARGV[8] the bytes of its grid): what was
# expected becomes what is stored, summed up by the minute in which it expires.
COUNT_STORED = f"""
if owner and owner ~= '' then
  local of_owner, now = '{keys.BYTES_PREFIX}' .. owner, redis.call('TIME')[1]
  local minute, size = math.ceil((now + ARGV[3]) / 60), (bytes or 0) + ARGV[8]
  redis.call('HDEL', of_owner, ARGV[1])
  local before = string.match(redis.call('HGET', of_owner, minute) or '0 0', ' (%-?%d+)')
  redis.call('HSET', of_owner, minute, minute * 60 .. ' ' .. before + size)
  if redis.call('TTL', of_owner) < minute * 60 - now then redis.call('EXPIREAT', of_owner, minute * 60) end
  redis.call('HSET', KEYS[2], 'bytes', size, 'bytes_minute', minute)
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


def reserve(connection: Redis, settings: Settings, record: JobRecord, expected_bytes: int) -> Full | None:
    """Reserve room for a job for `RESERVED_S`, or say what is full. An empty queue or store takes any one job."""
    return full_of(ask_for_room(connection, settings, record, expected_bytes), settings)


def ask_for_room(connection: Redis, settings: Settings, record: JobRecord, expected_bytes: int) -> Any:
    """Ask for the reservation, in a pipeline or at once. `full_of` reads the answer."""
    digest, owner, limits = record.digest, record.owner, _limits(settings)
    touched = (keys.pending_counts(digest), keys.stream(digest), keys.reserved(digest), keys.stored_bytes(owner))
    most = limits["queue"], limits["owner"], expected_bytes, limits["bytes"]
    return connection.eval(_RESERVE, len(touched), *touched, record.id, owner, record.total, *most, RESERVED_S)


def full_of(answer: Any, settings: Settings) -> Full | None:
    what, taken, expires_s = answer
    what = what.decode()
    return Full(what, int(taken), _limits(settings)[what], int(expires_s)) if what else None


def _limits(settings: Settings) -> dict[str, int]:
    limits = {"queue": settings.max_queued_pictures, "owner": 0, "bytes": 0}
    if settings.has_keys:
        limits |= {"owner": settings.max_queued_pictures_per_owner, "bytes": settings.max_stored_bytes_per_owner}
    return limits


def give_up(connection: Redis, record: JobRecord) -> None:
    """Drop the reservation of a job that is not created."""
    connection.hdel(keys.reserved(record.digest), record.id)
