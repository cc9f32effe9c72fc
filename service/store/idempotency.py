"""Idempotency keys: a request that is sent twice creates one job."""

import hashlib
from dataclasses import dataclass

from service.store.keys import idempotency_key


class KeyReused(ValueError):
    """An Idempotency-Key came again with another request."""


@dataclass(frozen=True)
class IdempotentRequest:
    """A request that may come twice and is to be one job: whose it is, their key for it, and what it asks for."""

    owner: str
    key: str
    request: str

    @property
    def redis_key(self) -> str:
        return idempotency_key(_hash(f"{self.owner}:{self.key}"))  # no owner's name has a colon

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
