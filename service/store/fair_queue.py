"""A fair queue of pending pictures: owners take turns, and so do the jobs of one owner.

A large job takes one turn per picture, so it delays another job's picture by one turn at most. Workers dispatch
pictures to the stream that they claim from (`claims.py`). Knows no HTTP and no torch, nor what jobs and pictures are.
"""

from redis import Redis
from redis.client import Pipeline

from service.store import keys

# Moves the next pictures to the stream, in rounds: each owner gives one picture of their first job, which then goes to
# the end of their list. An owner who has no pictures when it is their turn is forgotten. Not before: coming back, they
# would be first. Its first write takes something away, so that it runs on a full Redis too.
# KEYS: owners, pending counts, stream. ARGV: most pictures, prefix of jobs' keys.
_DISPATCH = """
local moved, most = 0, tonumber(ARGV[1])
local order = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
local turn = #order > 0 and tonumber(order[#order]) or 0
local taken, turns, idle = {}, {}, {}
local function asked_at(job) -- its id begins with it in ms (`job_ids.py`); ids of former versions do not
  return string.sub(job, 13, 13) == '7' and tonumber(string.sub(job, 1, 12), 16) / 1000 or ''
end
local function next_of(owner)
  local jobs = KEYS[1] .. ':' .. owner
  while true do
    local job = redis.call('LPOP', jobs)
    if not job then return nil end
    local pending = ARGV[2] .. job .. ':waiting'
    local picture, following = unpack(redis.call('LPOP', pending, 2) or {})
    if following then
      redis.call('LPUSH', pending, following)
      redis.call('RPUSH', jobs, job)
    end
    if picture then return picture, asked_at(job) end
  end
end
repeat
  local before = moved
  for i = 1, #order, 2 do
    if moved == most then break end
    local picture, asked_at
    if not idle[i] then picture, asked_at = next_of(order[i]) end
    if picture then
      redis.call('XADD', KEYS[3], '*', 'picture', picture, 'asked_at', asked_at)
      moved, turn = moved + 1, turn + 1
      taken[i], turns[i] = (taken[i] or 0) + 1, turn
    else
      idle[i] = true
    end
  end
until moved == most or moved == before
for i = 1, #order, 2 do
  if taken[i] then
    if redis.call('HINCRBY', KEYS[2], order[i], -taken[i]) <= 0 then redis.call('HDEL', KEYS[2], order[i]) end
    redis.call('ZADD', KEYS[1], turns[i], order[i])
  end
  if idle[i] then redis.call('ZREM', KEYS[1], order[i]) end
end
return moved
"""

# Part of the script that creates a job: adds it at the end of its owner's list. An owner keeps the place
# that their last turn gave them, so that frequent requests do not come first every time. An owner whose list is not
# empty has a place.
ENQUEUE = """
if redis.call('RPUSH', jobs, id) == 1 then redis.call('ZADD', owners, 'NX', 0, owner) end
redis.call('HINCRBY', counts, owner, total)
"""

# Part of the script that ends a job early: removes its pending pictures, and it from its owner's list.
REMOVE = f"""
local pending, digest = job .. ':waiting', redis.call('HGET', job, 'digest')
local count = redis.call('LLEN', pending)
if count > 0 and digest and owner then
  redis.call('DEL', pending)
  redis.call('LREM', '{keys.OWNERS_PREFIX}' .. digest .. ':' .. owner, 1, id)
  local counts = '{keys.PENDING_COUNTS_PREFIX}' .. digest
  if redis.call('HINCRBY', counts, owner, -count) <= 0 then redis.call('HDEL', counts, owner) end
end
"""

# Counts each owner's pending pictures again, and removes those whose job is gone.
# KEYS: owners, pending counts. ARGV: prefix of jobs' keys.
_RECOUNT = """
for _, owner in ipairs(redis.call('HKEYS', KEYS[2])) do
  local jobs, count = KEYS[1] .. ':' .. owner, 0
  for _, job in ipairs(redis.call('LRANGE', jobs, 0, -1)) do
    local pending = ARGV[1] .. job .. ':waiting'
    if redis.call('EXISTS', ARGV[1] .. job) == 1 then
      count = count + redis.call('LLEN', pending)
    else
      redis.call('DEL', pending)
      redis.call('LREM', jobs, 1, job)
    end
  end
  redis.call('HDEL', KEYS[2], owner)
  if count > 0 then redis.call('HSET', KEYS[2], owner, count) end
end
"""


def dispatch(pipe: Pipeline, digest: str, stream: str, most: int) -> None:
    """Move up to `most` of the next pictures to the end of the stream."""
    pipe.eval(_DISPATCH, 3, keys.owners(digest), keys.pending_counts(digest), stream, most, keys.JOB_PREFIX)


def recount(connection: Redis) -> None:
    """Repair the queue after an open job was deleted. Scans all keys of Redis."""
    for raw in connection.scan_iter(f"{keys.PENDING_COUNTS_PREFIX}*", count=1000):
        digest = raw.decode().removeprefix(keys.PENDING_COUNTS_PREFIX)
        connection.eval(_RECOUNT, 2, keys.owners(digest), keys.pending_counts(digest), keys.JOB_PREFIX)
