"""Each owner's list of jobs, and the tombstone that tells an expired job from one that never was."""

# Part of the script that creates a job, of `jobs.py`: adds it to its owner's list by the clock of Redis, since an API's
# may be wrong, sets a tombstone, which expires some time after the job's end, and, for one job in sixteen, drops those
# older than a lifetime. A job that no worker ended in time may outlive its place in the list. The milliseconds have a
# fixed width, because Redis compares members as text.
ADD = """
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', index, 0, string.format('%013.0f-%s', ms, id))
if ms % 16 == 0 then redis.call('ZREMRANGEBYLEX', index, '-', string.format('(%013.0f', ms - lifetime_s * 1000)) end
redis.call('EXPIRE', index, lifetime_s)
redis.call('SET', tombstone, owner)
"""


def id_of(member: str) -> str:
    """Return the job's id in a member of the list."""
    return member.partition("-")[2]
