"""The creation of a job by `create` in `jobs.lua`: for code that may block (`jobs.py`) and for the event loop.

Knows no HTTP.
"""

import asyncio
import functools
import json
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ResponseError

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import admission, functions, keys
from service.store.connection import text
from service.store.doorbell import Doorbell, ModelName
from service.store.idempotency import IdempotentRequest

FEW = 32  # pictures of a job whose arguments take the event loop a millisecond at most


def id_of(member: str) -> str:
    """Return the job's id in a member of its owner's list."""
    return member.partition("-")[2]


@dataclass(frozen=True)
class NewJob:
    """A job that is not stored yet."""

    record: JobRecord
    request: IdempotentRequest | None = None

    @property
    def model(self) -> ModelName:
        return ModelName(name=self.record.model, digest=self.record.digest, is_evaluator=self.record.sent)

    def arguments(self, settings: Settings) -> list[Any]:
        """Return the arguments of `create` in `jobs.lua`."""
        record, limits = self.record, admission.limits(settings)
        fields: dict[str, Any] = {"record": record.write(), "total": record.total, "status": "queued"}
        fields |= {"digest": record.digest, "owner": record.owner, "asked_at": record.created_at}
        if record.webhook:
            fields["webhook_events"] = " ".join(record.webhook_events)
        if self.request is not None:
            fields["request_key"] = self.request.redis_key
        of_job = flat(fields)
        about = {
            "id": record.id,
            "owner": record.owner,
            "digest": record.digest,
            "model": self.model.write(),
            "total": record.total,
            "fields": len(of_job),
            "timeout_s": settings.job_timeout_s,
            "lifetime_s": settings.job_timeout_s + settings.keep_s,
            "idempotent_s": settings.idempotent_s,
            "most_queued": limits["queue"],
            "most_own": limits["owner"],
            "most_stored": limits["stored"],
        }
        if self.request is not None:
            about |= {"request_key": self.request.redis_key, "request_hash": self.request.request_hash}
        pictures = (picture.write() for picture in record.pictures())
        return [json.dumps(about), *of_job, *pictures]

    def outcome(self, answer: Any, settings: Settings) -> str:
        """Return the job's id, given the answer of `create`, or that of the job that the same request created before.

        KeyReuse if its key stands for another request, NoRoom if the job does not fit.
        """
        if answer is None:
            return self.record.id
        if self.request is not None and answer[0] == b"request":
            return self.request.job_of(text(answer[1]))
        raise admission.NoRoom(admission.full_of(settings, answer))


class JobCreator:
    """Creates jobs without blocking the event loop, and wakes a worker for each."""

    def __init__(self, connection: AsyncRedis, settings: Settings, doorbell: Doorbell) -> None:
        self.connection, self.settings, self.doorbell = connection, settings, doorbell
        self._unsent = list[tuple[list[Any], asyncio.Future[Any]]]()  # arguments of small jobs, and their answers
        self._tasks = set[asyncio.Task[None]]()  # keeps the tasks alive
        self._unrung = set[ModelName]()

    async def existing_job(self, request: IdempotentRequest) -> str | None:
        """Return the job that the same request created before, if it still exists.

        KeyReuse if the key stands for another request, whose job is there.
        """
        raw = await self.connection.get(request.redis_key)
        if raw is None:
            return None
        value = text(raw)
        is_there = await self.connection.exists(keys.job(value.partition(" ")[0]))
        return request.job_of(value) if is_there else None

    async def create(self, new: NewJob) -> str:
        """Write a job and its pending pictures in one command, and return the job's id.

        If the same request created a job before, write nothing and return that job's id. KeyReuse, NoRoom as `outcome`.
        """
        write = functools.partial(new.arguments, self.settings)
        if new.record.total <= FEW:
            answer = await self._create_together(write())
        else:
            answer = await functions.call_async(self.connection, "create", *await asyncio.to_thread(write))
        job_id = new.outcome(answer, self.settings)
        self._unrung.add(new.model)
        if len(self._unrung) == 1:
            self._begin(self._ring())
        return job_id

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ring(self) -> None:
        """Wake workers for new jobs. Nobody waits for it: a worker that is not woken looks a second later."""
        models, self._unrung = self._unrung, set()
        await asyncio.to_thread(self.doorbell.ring, models)

    async def _create_together(self, arguments: list[Any]) -> Any:
        """Call `create`. Requests that arrive together, as after a batch, share one message to Redis."""
        answer = asyncio.get_running_loop().create_future()
        self._unsent.append((arguments, answer))
        if len(self._unsent) == 1:
            self._begin(self._send())  # runs after the requests that have arrived
        try:
            return await answer
        except ResponseError as error:
            if not functions.is_missing(error):
                raise
        return await functions.call_async(self.connection, "create", *arguments)

    async def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        pipe = self.connection.pipeline(transaction=False)
        for arguments, _ in unsent:
            functions.add_call(pipe, "create", *arguments)
        try:
            found = await pipe.execute(raise_on_error=False)
        except (Exception, asyncio.CancelledError) as error:
            found = [error] * len(unsent)
        for (_, answer), one in zip(unsent, found, strict=True):
            if answer.done():  # its request was cancelled
                continue
            if isinstance(one, BaseException):
                answer.set_exception(one)
            else:
                answer.set_result(one)


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Return names and values in turn, as HSET takes them."""
    return [part for pair in fields.items() for part in pair]
