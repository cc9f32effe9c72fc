"""The creation of a job by `create` in `jobs.lua`: for code that may block (`jobs.py`) and for the event loop.

Knows no HTTP.
"""

import asyncio
import functools
import json
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Self
from uuid import uuid4

from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ResponseError
from rq import Queue
from rq.job import Job as RqJob
from rq.job import JobStatus as RqJobStatus
from rq.utils import utcformat

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import admission, functions, keys
from service.store.connection import text
from service.store.idempotency import IdempotentRequest

FAILED_RQ_JOB_TTL_S = 60  # RQ's default is a year; nothing reads it, and every worker that is killed leaves one
FEW = 32  # pictures of a job whose arguments take the event loop a millisecond at most
RUN_JOB = "service.worker.run_job"  # by name, so that the API does not import the worker
DESCRIPTION = "labelgrid job {}"


@dataclass(frozen=True)
class RqId:
    """The id of a new job's RQ job: a reader of RQ's queue learns job, checkpoint and deadline without a look-up.

    overdue_at: Unix seconds by Redis's clock.
    """

    _PARTS: ClassVar = re.compile(r"(\w+)-(\w+)-(\d+)")  # as `create` joins them

    job_id: str
    digest: str
    overdue_at: int

    @classmethod
    def read(cls, rq_id: str) -> Self | None:
        """Return what the id tells; None for that of a job that was queued again, or by a version before 0.2."""
        found = cls._PARTS.fullmatch(rq_id)
        return cls(found[1], found[2], int(found[3])) if found else None


def id_of(member: str) -> str:
    """Return the job's id in a member of its owner's list."""
    return member.partition("-")[2]


def rq_job(queue: Queue, job_id: str) -> RqJob:
    """Return a new RQ job that runs a job, without storing it."""
    return queue.create_job(
        RUN_JOB,
        args=(job_id,),
        job_id=uuid4().hex,
        status=RqJobStatus.QUEUED,
        timeout=-1,  # RQ's SIGALRM cannot interrupt a long C call; the sweep enforces `job_timeout_s`
        result_ttl=0,
        failure_ttl=FAILED_RQ_JOB_TTL_S,
        description=DESCRIPTION.format(job_id),
    )


def rq_fields(queue: Queue, job_id: str) -> dict[str, Any]:
    """Return what Redis stores of a queued `rq_job`: what all have in common, made once, and what differs."""
    common, now = _common_rq_fields(queue), utcformat(datetime.now(UTC))
    small = zlib.compressobj(wbits=9, memLevel=1)  # zlib's default clears 256 KiB first, which takes ten times as long
    data = small.compress(queue.serializer.dumps((RUN_JOB, None, (job_id,), {}))) + small.flush()
    own = {"created_at": now, "enqueued_at": now, "data": data, "description": DESCRIPTION.format(job_id)}
    return {**common, **own}


@functools.cache
def _common_rq_fields(queue: Queue) -> dict[str, Any]:
    job = rq_job(queue, "")
    job.enqueued_at = job.created_at
    fields = {"status": job.get_status(refresh=False), **job.to_dict()}
    return {name: value for name, value in fields.items() if value != ""}  # RQ reads a missing field as an empty one


@dataclass(frozen=True)
class NewJob:
    """A job that is not stored yet.

    uploaded: the PNGs of one that only judges them. expected_bytes: of its results.
    """

    record: JobRecord
    request: IdempotentRequest | None = None
    uploaded: Sequence[bytes] = ()
    expected_bytes: int = 0

    def arguments(self, settings: Settings, queue: Queue) -> list[Any]:
        """Return the arguments of `create` in `jobs.lua`."""
        record, limits = self.record, admission.limits(settings)
        lifetime_s = settings.job_timeout_s + settings.job_ttl_s
        fields: dict[str, Any] = {"record": record.write(), "total": record.total, "status": "queued"}
        fields |= {"digest": record.digest, "owner": record.owner, "asked_at": record.created_at}
        if record.webhook:
            fields["webhook_events"] = " ".join(record.webhook_events)
        if self.uploaded:
            fields["bytes"] = sum(map(len, self.uploaded))
        of_job, of_rq_job = flat(fields), flat(rq_fields(queue, record.id))
        about = {
            "id": record.id,
            "owner": record.owner,
            "digest": record.digest,
            "total": record.total,
            "rq_queue": queue.key,
            "rq_jobs": RqJob.redis_job_namespace_prefix,
            "fields": len(of_job),
            "rq_fields": len(of_rq_job),
            "timeout_s": settings.job_timeout_s,
            "lifetime_s": lifetime_s,
            "remembered_s": lifetime_s + settings.remembered_s,
            "idempotent_s": settings.idempotent_s,
            "expected_bytes": self.expected_bytes,
            "most_queued": limits["queue"],
            "most_own": limits["owner"],
            "most_bytes": limits["bytes"],
        }
        if self.request is not None:
            about |= {"request_key": self.request.redis_key, "request_hash": self.request.request_hash}
        pictures = (picture.write() for picture in record.pictures())
        uploaded = flat({str(i): png for i, png in enumerate(self.uploaded)})
        return [json.dumps(about), *of_job, *of_rq_job, *pictures, *uploaded]

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
    """Creates jobs without blocking the event loop."""

    def __init__(self, connection: AsyncRedis, settings: Settings, queue: Queue) -> None:
        self.connection, self.settings, self.queue = connection, settings, queue
        self._unsent = list[tuple[list[Any], asyncio.Future[Any]]]()  # arguments of small jobs, and their answers
        self._sending = set[asyncio.Task[None]]()  # keeps the tasks alive

    async def existing_job(self, request: IdempotentRequest, is_kept: Callable[[str], Awaitable[bool]]) -> str | None:
        """Return the job that the same request created before, if it is in Redis or `is_kept`.

        KeyReuse if the key stands for another request, whose job is there.
        """
        raw = await self.connection.get(request.redis_key)
        if raw is None:
            return None
        value = text(raw)
        job_id = value.partition(" ")[0]
        is_there = await self.connection.exists(keys.job(job_id)) or await is_kept(job_id)
        return request.job_of(value) if is_there else None

    async def create(self, new: NewJob) -> str:
        """Write a job, its pending pictures and its RQ job in one command, and return the job's id.

        If the same request created a job before, write nothing and return that job's id. KeyReuse, NoRoom as `outcome`.
        """
        write = functools.partial(new.arguments, self.settings, self.queue)
        if new.record.total <= FEW:
            answer = await self._create_together(write())
        else:
            answer = await functions.call_async(self.connection, "create", *await asyncio.to_thread(write))
        return new.outcome(answer, self.settings)

    async def _create_together(self, arguments: list[Any]) -> Any:
        """Call `create`. Requests that arrive together, as after a batch, share one message to Redis."""
        answer = asyncio.get_running_loop().create_future()
        self._unsent.append((arguments, answer))
        if len(self._unsent) == 1:
            sending = asyncio.create_task(self._send())  # runs after the requests that have arrived
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
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
