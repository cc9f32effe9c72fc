"""The creation of a job: one script, for code that may block (`jobs.py`) and for the event loop. Knows no HTTP."""

import asyncio
import functools
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Self
from uuid import uuid4

from redis.asyncio import Redis as AsyncRedis
from rq import Queue
from rq.job import Job as RqJob
from rq.job import JobStatus as RqJobStatus
from rq.utils import utcformat

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import admission, fair_queue, idempotency, keys
from service.store.connection import text
from service.store.idempotency import IdempotentRequest

FAILED_RQ_JOB_TTL_S = 60  # RQ's default is a year; nothing reads it, and every worker that is killed leaves one
FEW = 32  # pictures of a job whose script takes the event loop a millisecond at most
RUN_JOB = "service.worker.run_job"  # by name, so that the API does not import the worker
DESCRIPTION = "labelgrid job {}"

# Part of the script below: adds the job to its owner's list by the clock of Redis, since an API's may be wrong, and for
# one job in sixteen drops those older than a lifetime. A job that no worker ended in time may outlive its place in the
# list. The milliseconds have a fixed width, because Redis compares members as text. The tombstone tells an expired job
# from one that never was; it outlives the results of a job that ends in time.
_LIST = """
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', index, 0, string.format('%013.0f-%s', ms, id))
if ms % 16 == 0 then redis.call('ZREMRANGEBYLEX', index, '-', string.format('(%013.0f', ms - lifetime_s * 1000)) end
redis.call('EXPIRE', index, lifetime_s)
redis.call('SET', tombstone, owner, 'EX', remembered_s)
"""

# Creates a job, if it fits and no request with its Idempotency-Key did before; returns nil, or what prevents it. The
# first write needs memory, so that a full Redis refuses the whole script. The deadline is by Redis's clock, because the
# clocks of API and workers may be wrong. The RQ job's id ends with it: see `RqId`. ARGV ends with fields and values of
# the job, those of its RQ job, pictures, and indices and PNGs of uploaded ones.
_CREATE = f"""
local job, open, pending, pngs, stream, counts, owners, jobs, index, tombstone, stored = unpack(KEYS, 1, 11)
local rq_queue, request = unpack(KEYS, 12)
local id, owner, total, job_prefix, request_hash, rq_jobs, rq_name, fields, rq_fields = unpack(ARGV, 1, 9)
local timeout_s, lifetime_s, remembered_s, idempotent_s = unpack(ARGV, 10, 13)
local expected, most_queued, most_own, most_bytes = unpack(ARGV, 14, 17)
local used, time = 17, redis.call('TIME')
local now = tonumber(time[1])
local overdue_at = string.format('%.0f', now + timeout_s)
local rq_id = rq_name .. overdue_at
local function put(count, ...)
  local last = used + count
  while used < last do -- in parts, since `unpack` returns some thousand values at most
    local first = used + 1
    used = math.min(used + 1000, last)
    local arguments = {{...}}
    for i = first, used do table.insert(arguments, ARGV[i]) end
    redis.call(unpack(arguments))
  end
end
{idempotency.FIND}
{admission.ADMIT}
put(fields, 'HSET', job, 'overdue_at', overdue_at, 'rq', rq_id)
redis.call('SADD', open, id)
put(rq_fields, 'HSET', rq_jobs .. rq_id)
redis.call('RPUSH', rq_queue, rq_id)
put(total, 'RPUSH', pending)
put(#ARGV - used, 'HSET', pngs)
{fair_queue.ENQUEUE}
{_LIST}
{admission.COUNT_EXPECTED}
{idempotency.REMEMBER}
return nil
"""


@dataclass(frozen=True)
class RqId:
    """The id of a new job's RQ job: a reader of RQ's queue learns job, checkpoint and deadline without a look-up.

    overdue_at: Unix seconds by Redis's clock.
    """

    _PARTS: ClassVar = re.compile(r"(\w+)-(\w+)-(\d+)")  # as `_CREATE` joins them

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

    def script(self, settings: Settings, queue: Queue) -> list[Any]:
        """Return the arguments of the EVAL that writes the job, its pending pictures and its RQ job."""
        record, request = self.record, self.request
        job_id, owner, digest = record.id, record.owner, record.digest
        of_rq_job = flat(rq_fields(queue, job_id))
        fields: dict[str, Any] = {"record": record.write(), "total": record.total, "status": "queued"}
        fields |= {"digest": digest, "owner": owner, "asked_at": record.created_at}
        if record.webhook:
            fields["webhook_events"] = " ".join(record.webhook_events)
        if self.uploaded:
            fields["bytes"] = sum(map(len, self.uploaded))
        touched = [keys.job(job_id), keys.OPEN, keys.pending(job_id), keys.png(job_id), keys.stream(digest)]
        touched += [keys.pending_counts(digest), keys.owners(digest), keys.owner_jobs(digest, owner)]
        touched += [keys.index(owner), keys.tombstone(job_id), keys.stored_bytes(owner)]
        touched += [queue.key]
        if request is not None:
            touched.append(request.redis_key)
        limits, lifetime_s = admission.limits(settings), settings.job_timeout_s + settings.job_ttl_s
        arguments: list[Any] = [job_id, owner, record.total, keys.JOB_PREFIX, request.request_hash if request else ""]
        arguments += [RqJob.redis_job_namespace_prefix, f"{job_id}-{digest}-", 2 * len(fields), len(of_rq_job)]
        arguments += [settings.job_timeout_s, lifetime_s, lifetime_s + settings.remembered_s, settings.idempotent_s]
        arguments += [self.expected_bytes, limits["queue"], limits["owner"], limits["bytes"]]
        arguments += [*flat(fields), *of_rq_job, *(picture.write() for picture in record.pictures())]
        arguments += flat({str(i): png for i, png in enumerate(self.uploaded)})
        return [_CREATE, len(touched), *touched, *arguments]

    def outcome(self, answer: Any, settings: Settings) -> str:
        """Return the job's id, given the script's answer, or that of the job that the same request created before.

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
        self._unsent = list[tuple[list[Any], asyncio.Future[Any]]]()  # scripts of small jobs, and their answers
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
        """Write a job, its pending pictures and its RQ job in one script, and return the job's id.

        If the same request created a job before, write nothing and return that job's id. KeyReuse, NoRoom as `outcome`.
        """
        write = functools.partial(new.script, self.settings, self.queue)
        if new.record.total <= FEW:
            answer = await self._eval_together(write())
        else:
            answer = await self.connection.eval(*await asyncio.to_thread(write))
        return new.outcome(answer, self.settings)

    async def _eval_together(self, script: list[Any]) -> Any:
        """Return the script's answer. Requests that arrive together, as after a batch, share one message to Redis."""
        answer = asyncio.get_running_loop().create_future()
        self._unsent.append((script, answer))
        if len(self._unsent) == 1:
            sending = asyncio.create_task(self._send())  # runs after the requests that have arrived
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        return await answer

    async def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        pipe = self.connection.pipeline(transaction=False)
        for script, _ in unsent:
            pipe.eval(*script)
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
