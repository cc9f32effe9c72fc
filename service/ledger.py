"""What is remembered of jobs besides the jobs themselves: `jobs.py` calls it when one is created.

Knows nothing of what jobs hold. Its keys:

    jobs              sorted set  MILLISECONDS-ID of each job, all with score 0, so that they sort by time
"""

from redis.client import Pipeline

PREFIX = "labelgrid"
INDEX = f"{PREFIX}:jobs"


def enter(pipe: Pipeline, job_id: str, created_at: float, lifetime_s: float) -> None:
    """Puts a job into the index, and takes those out that are older than any job can be."""
    pipe.zadd(INDEX, {f"{_milliseconds(created_at)}-{job_id}": 0})
    pipe.zremrangebylex(INDEX, "-", f"({_milliseconds(created_at - lifetime_s)}")


def _milliseconds(seconds: float) -> str:
    return f"{int(seconds * 1000):013d}"  # of one width, for they are compared as text


def id_of(member: str) -> str:
    """The job that a member of the index stands for."""
    return member.partition("-")[2]
