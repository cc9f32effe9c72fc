"""What is remembered of jobs besides the jobs themselves: `jobs.py` calls it when one is created.

Knows nothing of what jobs hold. Its keys:

    jobs:OWNER        sorted set  MILLISECONDS-ID of each job of an owner, all with score 0, so that they sort by time
    was:ID            string      the job's owner, and a note that it has been; outlives its results
    key:HASH          string      job and request that an owner's Idempotency-Key stands for, for the job's lifetime
"""

from redis.client import Pipeline

from service.store.keys import index_key, tombstone_key


def enter(pipe: Pipeline, job_id: str, owner: str, created_at: float, lifetime_s: int, remembered_s: int) -> None:
    """Puts a job into its owner's index, takes those out that are older than `lifetime_s`, and leaves a tombstone.

    For `remembered_s` it is known to have been, or for as long after its end as `jobs.py` says then. One that no worker
    ends in its time may be there when its owner's list has it no more.
    """
    index = index_key(owner)
    pipe.zadd(index, {f"{_milliseconds(created_at)}-{job_id}": 0})
    pipe.zremrangebylex(index, "-", f"({_milliseconds(created_at - lifetime_s)}")
    pipe.expire(index, lifetime_s)
    pipe.set(tombstone_key(job_id), owner, ex=remembered_s)


def _milliseconds(seconds: float) -> str:
    return f"{int(seconds * 1000):013d}"  # of one width, for they are compared as text


def id_of(member: str) -> str:
    """The job that a member of the index stands for."""
    return member.partition("-")[2]
