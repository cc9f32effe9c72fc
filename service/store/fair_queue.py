"""Whose picture is next: those that wait are dealt out in turns, by owner and then by job.

A large job takes as many turns as it has pictures and delays nobody's small one by more than a turn. A claim deals
pictures into the stream that workers read (`stream.py`); what waits is here:

    turns:DIGEST           sorted set  owners, those who had no turn for longest first
    turns:DIGEST:OWNER     list        the owner's jobs that have waiting pictures, in turn
    job:ID:waiting         list        pictures of a job that nobody has had yet
    waiting:DIGEST         hash        owner -> how many of their pictures wait

Knows no HTTP and no torch, and nothing of what jobs and pictures are.
"""

from collections.abc import Sequence

from redis import Redis
from redis.client import Pipeline

from service.store.keys import (
    JOB_PREFIX,
    OWNERS_PREFIX,
    PENDING_COUNTS_PREFIX,
    owner_jobs_key,
    owners_key,
    pending_counts_key,
    pending_key,
)

# KEYS: turns, waiting, stream. ARGV: how many at most, the prefix of jobs' keys. One round gives every owner one
# picture, of the first of their jobs, which then goes to the end of their line. What it writes first takes something
# away, so that a full Redis lets it go on.
_DEAL = """
local dealt, most = 0, tonumber(ARGV[1])
local order = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
local turn = #order > 0 and tonumber(order[#order]) or 0
local function next_of(owner)
  local jobs = KEYS[1] .. ':' .. owner
  while true do
    local job = redis.call('LPOP', jobs)
    if not job then return nil end
    local waiting = ARGV[2] .. job .. ':waiting'
    local picture = redis.call('LPOP', waiting)
    if picture then
      if redis.call('EXISTS', waiting) == 1 then redis.call('RPUSH', jobs, job) end
      return picture, redis.call('HGET', ARGV[2] .. job, 'asked_at')
    end
  end
end
repeat
  local before = dealt
  for i = 1, #order, 2 do
    if dealt == most then break end
    local picture, asked_at = next_of(order[i])
    if picture then
      redis.call('XADD', KEYS[3], '*', 'picture', picture, 'asked_at', asked_at or '')
      redis.call('HINCRBY', KEYS[2], order[i], -1)
      turn = turn + 1
      redis.call('ZADD', KEYS[1], turn, order[i])
      dealt = dealt + 1
    end
  end
until dealt == most or dealt == before
return dealt
"""

# KEYS: a job. ARGV: id, the prefixes of counts' and of turns' keys.
_FORGET = """
local whose = redis.call('HMGET', KEYS[1], 'digest', 'owner')
local count = redis.call('LLEN', KEYS[1] .. ':waiting')
if count > 0 and whose[1] then
  redis.call('DEL', KEYS[1] .. ':waiting')
  redis.call('LREM', ARGV[3] .. whose[1] .. ':' .. whose[2], 1, ARGV[1])
  redis.call('HINCRBY', ARGV[2] .. whose[1], whose[2], -count)
end
"""

# KEYS: turns, waiting. ARGV: the prefix of jobs' keys.
_RECOUNT = """
for _, owner in ipairs(redis.call('HKEYS', KEYS[2])) do
  local jobs, count = KEYS[1] .. ':' .. owner, 0
  for _, job in ipairs(redis.call('LRANGE', jobs, 0, -1)) do
    local waiting = ARGV[1] .. job .. ':waiting'
    if redis.call('EXISTS', ARGV[1] .. job) == 1 then
      count = count + redis.call('LLEN', waiting)
    else
      redis.call('DEL', waiting)
      redis.call('LREM', jobs, 1, job)
    end
  end
  redis.call('HDEL', KEYS[2], owner)
  redis.call('HSET', KEYS[2], owner, count)
end
"""


def join(pipe: Pipeline, job_id: str, owner: str, digest: str, asked_at: float, pictures: Sequence[str]) -> None:
    """A new job's pictures wait at the end of their owner's line. For the MULTI that creates the job.

    An owner keeps the place that their last turn gave them: who comes back often is not first every time.
    """
    pipe.hset(f"{JOB_PREFIX}{job_id}", mapping={"digest": digest, "owner": owner, "asked_at": asked_at})
    pipe.rpush(pending_key(job_id), *pictures)
    pipe.rpush(owner_jobs_key(digest, owner), job_id)
    pipe.zadd(owners_key(digest), {owner: 0}, nx=True)
    pipe.hincrby(pending_counts_key(digest), owner, len(pictures))


def deal(pipe: Pipeline, digest: str, stream: str, most: int) -> None:
    """Moves the next pictures, `most` at most, to the end of the stream."""
    pipe.eval(_DEAL, 3, owners_key(digest), pending_counts_key(digest), stream, most, JOB_PREFIX)


def forget(connection: Redis, job_id: str) -> None:
    """The waiting pictures of a job that ended early are not needed. Those that are in the stream, workers drop."""
    connection.eval(_FORGET, 1, f"{JOB_PREFIX}{job_id}", job_id, PENDING_COUNTS_PREFIX, OWNERS_PREFIX)


def recount(connection: Redis) -> None:
    """Puts right what waits where a job is gone that had not ended. It looks at all keys of Redis for that."""
    for raw in connection.scan_iter(f"{PENDING_COUNTS_PREFIX}*", count=1000):
        digest = raw.decode().removeprefix(PENDING_COUNTS_PREFIX)
        connection.eval(_RECOUNT, 2, owners_key(digest), pending_counts_key(digest), JOB_PREFIX)
