"""What is remembered of jobs besides the jobs themselves: `jobs.py` calls it when one is created.

Knows nothing of what jobs hold. Its keys:

    jobs:OWNER        sorted set  MILLISECONDS-ID of each job of an owner, all with score 0, so that they sort by time
    was:ID            string      the job's owner, and a note that it has been; outlives its results
    key:HASH          string      job and request that an owner's Idempotency-Key stands for, for the job's lifetime
"""

import hashlib
from dataclasses import dataclass

from redis.client import Pipeline

PREFIX = "labelgrid"


class KeyReused(ValueError):
    """An Idempotency-Key came again with another request."""


@dataclass(frozen=True)
class Asked:
    """A request that may come twice and is to be one job: whose it is, their key for it, and what it asks for."""

    owner: str
    key: str
    request: str

    @property
    def redis_key(self) -> str:
        return f"{PREFIX}:key:{_hash(f'{self.owner}:{self.key}')}"  # no owner's name has a colon

    def note(self, job_id: str) -> str:
        """What Redis keeps under `redis_key`."""
        return f"{job_id} {_hash(self.request)}"

    def job_of(self, note: str) -> str:
        """The job that a note names. KeyReused if it was written for another request."""
        job_id, _, request = note.partition(" ")
        if request != _hash(self.request):
            raise KeyReused("the key was used for another request; a new request needs a new key")
        return job_id


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def was_key(job_id: str) -> str:
    return f"{PREFIX}:was:{job_id}"


def index_key(owner: str) -> str:
    return f"{PREFIX}:jobs:{owner}"


def enter(pipe: Pipeline, job_id: str, owner: str, created_at: float, lifetime_s: int, remembered_s: int) -> None:
    """Puts a job into its owner's index, takes those out that are older than `lifetime_s`, and leaves a tombstone.

    For `remembered_s` it is known to have been, or for as long after its end as `jobs.py` says then. One that no worker
    ends in its time may be there when its owner's list has it no more.
    """
    index = index_key(owner)
    pipe.zadd(index, {f"{_milliseconds(created_at)}-{job_id}": 0})
    pipe.zremrangebylex(index, "-", f"({_milliseconds(created_at - lifetime_s)}")
    pipe.expire(index, lifetime_s)
    pipe.set(was_key(job_id), owner, ex=remembered_s)


def _milliseconds(seconds: float) -> str:
    return f"{int(seconds * 1000):013d}"  # of one width, for they are compared as text


def id_of(member: str) -> str:
    """The job that a member of the index stands for."""
    return member.partition("-")[2]
