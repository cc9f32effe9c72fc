"""Whether a new job fits: into its model's queue, and into what its owner may store. Knows no HTTP.

A request that fits gets a reservation in the same script, so that simultaneous requests cannot pass together. Creating
the job replaces the reservation.
"""

from dataclasses import dataclass

from redis import Redis
from redis.client import Pipeline

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
local stored = redis.call('HGETALL', KEYS[4])
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

# Counts a new job's expected bytes until its end. KEYS: the owner's bytes. ARGV: job's id, bytes, its lifetime in s.
_EXPECT = """
redis.call('HSET', KEYS[1], ARGV[1], (redis.call('TIME')[1] + ARGV[3]) .. ' ' .. ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
"""

# Parts of the scripts of `jobs.py`. At a job's end (KEYS[2] is the job, ARGV[1] its id, ARGV[3] its time to live): what
# was expected becomes what is stored, summed up by the minute in which it expires.
COUNT_STORED = f"""
local of_owner = '{keys.BYTES_PREFIX}' .. (redis.call('HGET', KEYS[2], 'owner') or '')
redis.call('HDEL', of_owner, ARGV[1])
local minute = math.ceil((redis.call('TIME')[1] + ARGV[3]) / 60)
local size = tonumber(redis.call('HGET', KEYS[2], 'bytes') or 0)
local before = string.match(redis.call('HGET', of_owner, minute) or '0 0', ' (%-?%d+)')
redis.call('HSET', of_owner, minute, minute * 60 .. ' ' .. before + size)
if redis.call('TTL', of_owner) < minute * 60 - redis.call('TIME')[1] then
  redis.call('EXPIREAT', of_owner, minute * 60)
end
redis.call('HSET', KEYS[2], 'bytes_minute', minute)
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
    limits = {"queue": settings.max_queued_pictures, "owner": 0, "bytes": 0}
    if settings.has_keys:
        limits |= {"owner": settings.max_queued_pictures_per_owner, "bytes": settings.max_stored_bytes_per_owner}
    digest, owner = record.digest, record.owner
    touched = (keys.pending_counts(digest), keys.stream(digest), keys.reserved(digest), keys.stored_bytes(owner))
    most = limits["queue"], limits["owner"], expected_bytes, limits["bytes"]
    answer = connection.eval(_RESERVE, len(touched), *touched, record.id, owner, record.total, *most, RESERVED_S)
    what, taken, expires_s = answer
    what = what.decode()
    return Full(what, int(taken), limits[what], int(expires_s)) if what else None


def settle(pipe: Pipeline, record: JobRecord, expected_bytes: int, lifetime_s: int) -> None:
    """Replace a job's reservation, as part of the MULTI that creates the job."""
    pipe.hdel(keys.reserved(record.digest), record.id)
    pipe.eval(_EXPECT, 1, keys.stored_bytes(record.owner), record.id, expected_bytes, lifetime_s)


def give_up(connection: Redis, record: JobRecord) -> None:
    """Drop the reservation of a job that is not created."""
    connection.hdel(keys.reserved(record.digest), record.id)
