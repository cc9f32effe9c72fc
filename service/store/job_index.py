"""Each owner's list of jobs, and the tombstone that tells an expired job from one that never was."""

from redis.client import Pipeline

from service.store import keys

# Adds a job by the clock of Redis, since an API's may be wrong, and drops those older than a lifetime. The milliseconds
# have a fixed width, because Redis compares members as text.
# KEYS: the owner's list. ARGV: job's id, lifetime in s.
_ADD = """
local time = redis.call('TIME')
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], 0, string.format('%013.0f-%s', ms, ARGV[1]))
redis.call('ZREMRANGEBYLEX', KEYS[1], '-', string.format('(%013.0f', ms - ARGV[2] * 1000))
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


def add(pipe: Pipeline, job_id: str, owner: str, lifetime_s: int, remembered_s: int) -> None:
    """Add a job to its owner's list, drop jobs older than `lifetime_s` from it, and set a tombstone.

    The tombstone expires after `remembered_s`; when the job ends, `jobs.py` sets a new time. A job that no worker
    ended in time may outlive its place in the list.
    """
    pipe.eval(_ADD, 1, keys.index(owner), job_id, lifetime_s)
    pipe.set(keys.tombstone(job_id), owner, ex=remembered_s)


def id_of(member: str) -> str:
    """Return the job's id in a member of the list."""
    return member.partition("-")[2]
