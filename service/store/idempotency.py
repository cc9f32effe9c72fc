"""Idempotency keys: a request that is sent twice creates one job."""

import hashlib
from dataclasses import dataclass

from service.store import keys


class KeyReused(ValueError):
    """An Idempotency-Key was sent again with another request."""


@dataclass(frozen=True)
class IdempotentRequest:
    """A request that carries an Idempotency-Key: its owner, the key, and the request as canonical text."""

    owner: str
    key: str
    request: str

    @property
    def redis_key(self) -> str:
        return keys.idempotency(_hash(f"{self.owner}:{self.key}"))  # an owner's name has no colon

    def value(self, job_id: str) -> str:
        """Return what Redis stores under `redis_key`: the job and a hash of the request."""
        return f"{job_id} {_hash(self.request)}"

    def job_of(self, value: str) -> str:
        """Return the job in a stored value. KeyReused if it belongs to another request."""
        job_id, _, request = value.partition(" ")
        if request != _hash(self.request):
            raise KeyReused("the key was used for another request; a new request needs a new key")
        return job_id


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
