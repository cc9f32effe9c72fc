"""What is remembered of jobs besides the jobs themselves: `jobs.py` calls it when one is created.

Knows nothing of what jobs hold. Its keys:

    jobs              sorted set  MILLISECONDS-ID of each job, all with score 0, so that they sort by time
    was:ID            string      the job was there; outlives its results
"""

from redis.client import Pipeline

PREFIX = "labelgrid"
INDEX = f"{PREFIX}:jobs"


def was_key(job_id: str) -> str:
    return f"{PREFIX}:was:{job_id}"


def enter(pipe: Pipeline, job_id: str, created_at: float, lifetime_s: int, remembered_s: int) -> None:
    """Puts a job into the index, takes those out that are older than any job can be, and leaves a tombstone.

    A job lives for `lifetime_s` at most; for `remembered_s` more it is known to have been.
    """
    pipe.zadd(INDEX, {f"{_milliseconds(created_at)}-{job_id}": 0})
    pipe.zremrangebylex(INDEX, "-", f"({_milliseconds(created_at - lifetime_s)}")
    pipe.set(was_key(job_id), 1, ex=lifetime_s + remembered_s)


def _milliseconds(seconds: float) -> str:
    return f"{int(seconds * 1000):013d}"  # of one width, for they are compared as text


def id_of(member: str) -> str:
    """The job that a member of the index stands for."""
    return member.partition("-")[2]
