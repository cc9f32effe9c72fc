"""Idempotency keys: a request that is sent twice creates one job."""

import hashlib
from dataclasses import dataclass

from service.contract.errors import KeyReuse
from service.store import keys


@dataclass(frozen=True)
class IdempotentRequest:
    """A request that carries an Idempotency-Key: its owner, the key, and the request as canonical text."""

    owner: str
    key: str
    request: str

    @property
    def redis_key(self) -> str:
        return keys.idempotency(_hash(f"{self.owner}:{self.key}"))  # an owner's name has no colon

    @property
    def request_hash(self) -> str:
        return _hash(self.request)

    def job_of(self, value: str) -> str:
        """Return the job in what Redis stores under `redis_key`. KeyReuse if it belongs to another request."""
        job_id, _, request = value.partition(" ")
        if request != self.request_hash:
            message = "the key was used for another request; a new request needs a new key"
            raise KeyReuse.at(("header", "Idempotency-Key"), message)
        return job_id


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
