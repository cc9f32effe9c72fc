"""The creation of a job by `create` in `jobs.lua`, without blocking the event loop. Knows no HTTP.

The function checks whether the job fits, so that simultaneous requests cannot pass a limit together.
"""

import asyncio
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from service.contract.errors import KeyReuse
from service.contract.records import JobRecord
from service.settings import Settings
from service.store import functions, keys
from service.store.connection import text
from service.store.doorbell import Doorbell, ModelName
from service.store.pipeline import Pipeline

FEW = 32  # pictures of a job whose arguments take the event loop a millisecond at most


class NoRoom(Exception):
    """A job does not fit: the model's "queue", the "owner"'s part of it, or what the owner has "stored" is full.

    `taken`: how many pictures there are, `most` the limit.
    """

    def __init__(self, what: str, taken: int, most: int) -> None:
        super().__init__(f"{what}: {taken} of {most}")
        self.what, self.taken, self.most = what, taken, most


@dataclass(frozen=True)
class IdempotentRequest:
    """A request that carries an Idempotency-Key: its owner, the key, and the request as canonical text."""

    owner: str
    key: str
    request: str

    @property
    def redis_key(self) -> str:
        return keys.idempotency(_hash(f"{self.owner}:{self.key}"))  # an owner's name has no colon

    def job_of(self, value: str) -> str:
        """Return the job in what Redis stores under `redis_key`. KeyReuse if it belongs to another request."""
        job_id, _, request = value.partition(" ")
        if request != _hash(self.request):
            message = "the key was used for another request; a new request needs a new key"
            raise KeyReuse.at(("header", "Idempotency-Key"), message)
        return job_id


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def model_of(record: JobRecord) -> ModelName:
    return ModelName(name=record.model, digest=record.digest, is_evaluator=record.sent)


def arguments(record: JobRecord, request: IdempotentRequest | None, settings: Settings) -> list[Any]:
    """Return the arguments of `create` in `jobs.lua`."""
    fields: dict[str, Any] = {"record": record.write(), "total": record.total, "status": "queued"}
    fields |= {"digest": record.digest, "owner": record.owner, "asked_at": record.created_at}
    if record.webhook:
        fields["webhook_events"] = " ".join(record.webhook_events)
    if request is not None:
        fields["request_key"] = request.redis_key
    own = settings.has_keys
    about = {
        "id": record.id,
        "owner": record.owner,
        "digest": record.digest,
        "model": model_of(record).write(),
        "total": record.total,
        "fields": 2 * len(fields),
        "timeout_s": settings.job_timeout_s,
        "lifetime_s": settings.job_timeout_s + settings.keep_s,
        "idempotent_s": settings.idempotent_s,
        "most_queued": settings.max_queued_pictures,
        "most_own": settings.max_queued_pictures_per_owner if own else 0,
        "most_stored": settings.max_stored_pictures_per_owner if own else 0,
    }
    if request is not None:
        about |= {"request_key": request.redis_key, "request_hash": _hash(request.request)}
    pictures = (picture.write() for picture in record.pictures())
    return [json.dumps(about), *functions.flat(fields), *pictures]


def before(answer: Any, request: IdempotentRequest | None, settings: Settings) -> str:
    """Return the job that the same request created before, if `create` answers so instead of creating one.

    KeyReuse if its key stands for another request, NoRoom if the job does not fit.
    """
    what, found = map(text, answer)
    if what == "request":
        assert request is not None
        return request.job_of(found)
    most = {
        "queue": settings.max_queued_pictures,
        "owner": settings.max_queued_pictures_per_owner,
        "stored": settings.max_stored_pictures_per_owner,
    }
    raise NoRoom(what, int(found), most[what])


class JobCreator:
    """Creates jobs, and wakes a worker for each."""

    def __init__(self, redis: Pipeline, settings: Settings, doorbell: Doorbell) -> None:
        self.redis, self.settings, self.doorbell = redis, settings, doorbell
        self._unrung = set[ModelName]()

    async def existing_job(self, request: IdempotentRequest) -> str | None:
        """Return the job that the same request created before, if it still exists.

        KeyReuse if the key stands for another request, whose job is there.
        """
        raw = await self.redis("GET", request.redis_key)
        if raw is None or not await self.redis("EXISTS", keys.job(text(raw).partition(" ")[0])):
            return None
        return request.job_of(text(raw))

    async def create(self, record: JobRecord, request: IdempotentRequest | None = None) -> str:
        """Write a job and its pending pictures in one command, and return the job's id.

        If the same request created a job before, write nothing and return that job's id. KeyReuse, NoRoom as `before`.
        """
        given = record, request, self.settings
        about = arguments(*given) if record.total <= FEW else await asyncio.to_thread(arguments, *given)
        answer = await self.redis.call("create", *about)
        if answer is not None:
            return before(answer, request, self.settings)
        self._unrung.add(model_of(record))
        if len(self._unrung) == 1:
            asyncio.get_running_loop().call_soon(self._ring)
        return record.id

    def _ring(self) -> None:
        """Wake workers for new jobs. Nobody waits for it: a worker that is not woken looks a second later."""
        models, self._unrung = self._unrung, set()
        asyncio.get_running_loop().run_in_executor(None, self.doorbell.ring, models)
