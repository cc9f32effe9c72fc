"""Each owner's list of jobs, and the tombstone that tells an expired job from one that never was."""

from redis.client import Pipeline

from service.store import keys


def add(pipe: Pipeline, job_id: str, owner: str, created_at: float, lifetime_s: int, remembered_s: int) -> None:
    """Add a job to its owner's list, drop jobs older than `lifetime_s` from it, and set a tombstone.

    The tombstone expires after `remembered_s`; when the job ends, `jobs.py` sets a new time. A job that no worker
    ended in time may outlive its place in the list.
    """
    index = keys.index(owner)
    pipe.zadd(index, {f"{_milliseconds(created_at)}-{job_id}": 0})
    pipe.zremrangebylex(index, "-", f"({_milliseconds(created_at - lifetime_s)}")
    pipe.expire(index, lifetime_s)
    pipe.set(keys.tombstone(job_id), owner, ex=remembered_s)


def _milliseconds(seconds: float) -> str:
    return f"{int(seconds * 1000):013d}"  # of fixed width, because Redis compares members as text


def id_of(member: str) -> str:
    """Return the job's id in a member of the list."""
    return member.partition("-")[2]
