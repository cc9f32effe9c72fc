"""Jobs in Redis: their state, which is the truth (RQ's is not), their pictures, and who works on them.

Knows no HTTP, no torch and no files. Used by the API to create a job and by workers to carry it out; `views.py` reads
for clients, `shares.py` says whose picture is next, `stream.py` hands it to workers. All keys begin with `labelgrid:`
and those of jobs have a time to live (`ledger.py` and `shares.py` have some more):

    job:ID            hash    record (JSON, never changes), total, status, rq, started_at, finished_at, result, error,
                              overdue_at (s since 1970 by Redis's clock), and of the record digest, owner, asked_at
    job:ID:verdicts   hash    index -> verdict (JSON): a picture is done when it has one
    job:ID:png        hash    index, "grid" or "strip:" and index -> PNG; a grid of one picture is only its index.
                              Pictures that are sent lie here from the start
    job:ID:events     stream  what happened, for those who wait
    job:ID:live       stream  steps and previews of the moment, while somebody watches
    job:ID:watched    string  somebody watches; gone seconds after nobody does
    open              set     ids of the jobs that are in no terminal state
    pictures:DIGEST   stream  pictures of one checkpoint that are in work, or are dealt out to be so at once
    worker:NAME       string  what a live worker says of itself (JSON); gone `lease_s` after its last word
    workers           set     names of workers; some may have died
"""

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ExecAbortError, OutOfMemoryError, WatchError
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from service.contract.records import ACTIVE, TERMINAL, FinishedPicture, JobRecord, JobResult, JobStatus, Verdict
from service.settings import Settings
from service.store import fair_queue as shares
from service.store import job_index as ledger
from service.store import webhook_outbox as due
from service.store.connection import best_effort, text
from service.store.idempotency import IdempotentRequest
from service.store.keys import (
    OPEN,
    WORKERS,
    events_key,
    job_key,
    pending_key,
    png_key,
    tombstone_key,
    trajectory_field,
    verdicts_key,
    worker_key,
)
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.telemetry.metrics import JOBS_ENDED

log = get_logger(__name__)
KEPT_EVENTS = 1000  # per job; a waiter that missed older ones reads the state itself
FAILED_RQ_JOB_TTL_S = 3600  # RQ's own default keeps them for a year
UNATTENDED_S = 7 * 86400  # an open job is kept so much longer than its time, so that a worker which comes late ends it
SWEPT = 500  # jobs, about, that one sweep looks at: it stays short however many wait
RUN_JOB = "service.worker.run_job"  # by name, so that the API does not import the worker
# When an open job is overdue, unless that is known. KEYS: job, and what else there may be of it. ARGV: the time that a
# job has from now on, and how long it is kept, both in s.
_SET_DEADLINE = """
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'queued' and status ~= 'running' then return end
redis.call('HSETNX', KEYS[1], 'overdue_at', redis.call('TIME')[1] + ARGV[1])
for i = 1, #KEYS do redis.call('EXPIRE', KEYS[i], ARGV[2]) end
"""
# A job's status moves queued -> running -> a terminal one, and from a terminal one never. KEYS: open, job, events,
# verdicts, png, RQ's queue, the note that the job has been. ARGV: id, new status, time to live in s, kept events, grid
# or "", the prefix of RQ's jobs, for how long after its end the note stays, in s, then fields and values. With a job's
# end its RQ job goes, too, if no worker has taken it: where pictures are made beside another job's, most are not
# needed. Returns whether a webhook is due, and the job's record; nothing if the job does not move.
_MOVE = """
local status = redis.call('HGET', KEYS[2], 'status')
local to = ARGV[2]
if not (status == 'queued' or (status == 'running' and to ~= 'running')) then return nil end
redis.call('HDEL', KEYS[2], 'status')
redis.call('HSET', KEYS[2], 'status', to, unpack(ARGV, 8))
if ARGV[5] ~= '' then redis.call('HSET', KEYS[5], 'grid', ARGV[5]) end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '*', 'status', to)
if to == 'running' then
  redis.call('EXPIRE', KEYS[3], ARGV[3])
else
  redis.call('SREM', KEYS[1], ARGV[1])
  local rq = redis.call('HGET', KEYS[2], 'rq')
  if rq and redis.call('LREM', KEYS[6], 1, rq) == 1 then redis.call('DEL', ARGV[6] .. rq) end
  for i = 2, 5 do redis.call('EXPIRE', KEYS[i], ARGV[3]) end
  redis.call('EXPIRE', KEYS[7], ARGV[7])
end
"""
_MOVE += due.NOTE + "return {due, redis.call('HGET', KEYS[2], 'record')}\n"
# A picture comes off the stream, and is kept if its job is open and nobody made it before. KEYS: stream, job, verdicts,
# png, events. ARGV: group, entry, index, verdict, PNG, strip's name, strip or "", kept events, time to live in s.
_COMMIT = """
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
local status = redis.call('HGET', KEYS[2], 'status')
if status ~= 'queued' and status ~= 'running' then return end
if redis.call('HSETNX', KEYS[3], ARGV[3], ARGV[4]) == 0 then return end
redis.call('HSETNX', KEYS[4], ARGV[3], ARGV[5])
if ARGV[7] ~= '' then redis.call('HSETNX', KEYS[4], ARGV[6], ARGV[7]) end
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[8], '*', 'picture', ARGV[3])
for i = 3, #KEYS do redis.call('EXPIRE', KEYS[i], ARGV[9]) end
"""
# KEYS: workers, worker. ARGV: name, what it says, for how long in ms.
_SAY_ALIVE = """
redis.call('DEL', KEYS[2])
redis.call('SADD', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
"""


def new_id() -> str:
    return uuid4().hex


class JobStore:
    """The jobs of one Redis, for code that may block."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection, self.settings = connection, settings
        self.lifetime_s = settings.job_timeout_s + settings.job_ttl_s
        self.open_ttl_s = self.lifetime_s + UNATTENDED_S
        # JSON for arguments: nothing that is fetched from Redis is unpickled.
        self.queue = Queue(settings.queue, connection=connection, serializer=JSONSerializer)
        self.webhooks = Queue(settings.webhook_queue, connection=connection, serializer=JSONSerializer)
        self._say_alive = connection.register_script(_SAY_ALIVE)
        self._lost_once: set[str] = set()
        self._sweep_at = 0  # cursor in the set of open jobs

    def create(self, record: JobRecord, asked: IdempotentRequest | None = None, sent: Sequence[bytes] = ()) -> str:
        """The job, its pictures and its RQ job in one MULTI: all of it is there, or nothing. Returns the job's id.

        `sent`: the PNGs of a job whose pictures are only judged.
        Where a job stands under the key of `asked`, nothing is created, and its id is returned. KeyReused.
        """
        while True:
            with self.connection.pipeline(transaction=True) as pipe, contextlib.suppress(WatchError):
                if asked is not None:
                    pipe.watch(asked.redis_key)  # type: ignore[no-untyped-call]
                    if (existing := self.existing_job(asked)) is not None:
                        return existing
                self._write(record, asked, sent, pipe)
                return record.id

    def _write(self, record: JobRecord, asked: IdempotentRequest | None, sent: Sequence[bytes], pipe: Pipeline) -> None:
        pipe.multi()  # RQ would else, after the first command, ask for it itself, which is an error
        rq_id = self._enqueue(record.id, pipe)
        pipe.hset(
            job_key(record.id),
            mapping={"record": record.model_dump_json(), "total": record.total, "status": "queued", "rq": rq_id},
        )
        if record.webhook:
            pipe.hset(job_key(record.id), "webhook_events", " ".join(record.webhook_events))
        if sent:
            pipe.hset(png_key(record.id), mapping={str(i): png for i, png in enumerate(sent)})
        pipe.sadd(OPEN, record.id)
        remembered_s = self.open_ttl_s + self.settings.remembered_s
        ledger.enter(pipe, record.id, record.owner, record.created_at, self.lifetime_s, remembered_s)
        if asked is not None:
            pipe.set(asked.redis_key, asked.note(record.id), ex=self.open_ttl_s)
        pictures = [picture.model_dump_json() for picture in record.pictures()]
        shares.join(pipe, record.id, record.owner, record.digest, record.created_at, pictures)
        keys = [job_key(record.id), pending_key(record.id)]
        self._set_deadline(pipe, [*keys, png_key(record.id)] if sent else keys)
        try:
            pipe.execute()
        except ExecAbortError as error:  # each command was taken, but there was no room any more for all of them
            if "OOM" in str(error):
                raise OutOfMemoryError(str(error)) from error
            raise

    def _set_deadline(self, pipe: Pipeline, keys: Sequence[str]) -> None:
        pipe.eval(_SET_DEADLINE, len(keys), *keys, self.settings.job_timeout_s, self.open_ttl_s)

    def existing_job(self, asked: IdempotentRequest) -> str | None:
        """The job that was created for the same request before, if it is there yet. KeyReused for another request."""
        note = self.connection.get(asked.redis_key)
        job_id = None if note is None else asked.job_of(text(note))
        return job_id if job_id is not None and self.connection.exists(job_key(job_id)) else None

    def _enqueue(self, job_id: str, pipe: Pipeline) -> str:
        rq_id = new_id()
        self.queue.enqueue_call(
            RUN_JOB,
            args=(job_id,),
            job_id=rq_id,
            timeout=-1,  # SIGALRM cannot end a long C call; `job_timeout_s` is ours
            result_ttl=0,
            failure_ttl=FAILED_RQ_JOB_TTL_S,
            description=f"labelgrid job {job_id}",
            pipeline=pipe,
        )
        return rq_id

    def record(self, job_id: str) -> JobRecord | None:
        raw = self.connection.hget(job_key(job_id), "record")
        return None if raw is None else JobRecord.model_validate_json(raw)

    def open_record(self, job_id: str) -> tuple[JobRecord, int] | None:
        """The record of a job that has not ended, with how many of its pictures are done; None for any other."""
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.hmget(job_key(job_id), ["record", "status"])
            pipe.hlen(verdicts_key(job_id))
            (raw, status), done = pipe.execute()
        return (JobRecord.model_validate_json(raw), done) if _is_open(raw, status) else None

    def statuses(self, job_ids: Iterable[str]) -> dict[str, str | None]:
        """The jobs' statuses; None for one that is gone."""
        ids = list(job_ids)
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(job_key(job_id), "status")
            return {i: None if raw is None else text(raw) for i, raw in zip(ids, pipe.execute(), strict=True)}

    def is_open(self, job_id: str) -> bool:
        return self.statuses([job_id])[job_id] in ACTIVE

    def begin(self, job_id: str) -> bool:
        return self.begin_all([job_id])

    def begin_all(self, job_ids: Iterable[str]) -> bool:
        """The jobs' pictures are in work. False if none of them waited for that."""
        return self._move_all("running", {job_id: {"started_at": time.time()} for job_id in job_ids})

    def fail(self, job_id: str, reason: str) -> bool:
        """Ends the job; `reason` is for the client to read. False if it had ended before."""
        return self._move_all("failed", {job_id: {"finished_at": time.time(), "error": reason}})

    def cancel(self, job_id: str) -> bool:
        """Ends the job, as its client wants; workers drop its pictures at their next step. False if it had ended."""
        return self._move_all("cancelled", {job_id: {"finished_at": time.time()}})

    def finish(self, job_id: str, result: JobResult, grid: bytes) -> bool:
        """Ends the job with its result. False if it had ended before."""
        return self.finish_all({job_id: (result, grid)})

    def finish_all(self, finished: Mapping[str, tuple[JobResult, bytes]]) -> bool:
        """Ends jobs with their results and grids. False if all of them had ended before."""
        now, grids = time.time(), {job_id: grid for job_id, (_, grid) in finished.items()}
        fields = {i: {"finished_at": now, "result": result.model_dump_json()} for i, (result, _) in finished.items()}
        return self._move_all("finished", fields, grids)

    def _move_all(
        self, status: JobStatus, jobs: Mapping[str, dict[str, Any]], grids: Mapping[str, bytes] | None = None
    ) -> bool:
        """Moves jobs, by id with what is noted in each, in one go. Whether one moved."""
        if not jobs:
            return False
        ttl = self.settings.job_ttl_s if status in TERMINAL else self.open_ttl_s
        remembered_s = self.settings.job_ttl_s + self.settings.remembered_s
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id, fields in jobs.items():
                keys = [OPEN, job_key(job_id), events_key(job_id), verdicts_key(job_id), png_key(job_id)]
                keys += [self.queue.key, tombstone_key(job_id)]
                grid = (grids or {}).get(job_id, b"")
                given: list[Any] = [job_id, status, ttl, KEPT_EVENTS, grid, RqJob.redis_job_namespace_prefix]
                given += [remembered_s, *(part for pair in fields.items() for part in pair)]
                # Not by its digest, which a Redis that restarts in between does not know.
                pipe.eval(_MOVE, len(keys), *keys, *given)
            answers = pipe.execute()
        moved = [self._moved(i, status, jobs[i], answer) for i, answer in zip(jobs, answers, strict=True)]
        return any(moved)

    def _moved(self, job_id: str, status: JobStatus, fields: dict[str, Any], answer: Any) -> bool:
        """What follows from the script's answer; False if the job did not move."""
        if answer is None:
            return False
        is_due, raw = answer
        if raw is not None:
            record = JobRecord.model_validate_json(raw)
            _log(f"job {status}", record, **({"reason": fields["error"]} if "error" in fields else {}))
            if status == "running":
                tracing.record("queue", record.traceparent, {"job_id": job_id}, record.created_at)
        if status in TERMINAL:
            JOBS_ENDED.labels(status).inc()
            if status != "finished":
                shares.forget(self.connection, job_id)
        if is_due:
            with best_effort():  # what RQ is not told, the webhooks' worker finds
                due.enqueue(self.webhooks, job_id, status)
        return True

    def commit(self, stream: str, group: str, done: Sequence[FinishedPicture]) -> set[str]:
        """Stores pictures and takes them off the stream; returns the jobs that now have all of theirs.

        Of two workers that made the same picture, the first to come is kept; of a job that has ended, none is.
        """
        jobs = sorted({one.picture.job for one in done})
        with self.connection.pipeline(transaction=False) as pipe:
            for one in done:
                job_id, index = one.picture.key
                keys = [stream, job_key(job_id), verdicts_key(job_id), png_key(job_id), events_key(job_id)]
                made: list[str | bytes] = [
                    str(index),
                    one.verdict.model_dump_json(),
                    one.png,
                    trajectory_field(index),
                    one.strip or b"",
                ]
                pipe.eval(_COMMIT, len(keys), *keys, group, one.entry, *made, KEPT_EVENTS, self.open_ttl_s)
            for job_id in jobs:
                pipe.hlen(verdicts_key(job_id))
                pipe.hget(job_key(job_id), "total")
            counts = pipe.execute()[-2 * len(jobs) :]
        return {j for j, n, total in zip(jobs, counts[::2], counts[1::2], strict=True) if total and n >= int(total)}

    def done_indices(self, job_id: str) -> set[int]:
        return {int(index) for index in self.connection.hkeys(verdicts_key(job_id))}

    def done_count(self, job_id: str) -> int:
        """How many of its pictures are done."""
        return self.connection.hlen(verdicts_key(job_id))

    def progress(self, job_ids: Iterable[str]) -> dict[str, tuple[str | None, set[int]]]:
        """The jobs' statuses, None for one that is gone, and the indices of their pictures that are done."""
        ids = list(job_ids)
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(job_key(job_id), "status")
                pipe.hkeys(verdicts_key(job_id))
            found = pipe.execute() if ids else []
        return {
            job_id: (None if status is None else text(status), {int(index) for index in indices})
            for job_id, status, indices in zip(ids, found[::2], found[1::2], strict=True)
        }

    def open_verdicts(self, job_ids: Iterable[str]) -> list[tuple[JobRecord, list[Verdict]]]:
        """The records of those of the jobs that have not ended, each with the verdicts of its done pictures."""
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(job_key(job_id), ["record", "status"])
                pipe.hvals(verdicts_key(job_id))
            found = pipe.execute()
        return [
            (JobRecord.model_validate_json(raw), read_verdicts(verdicts))
            for (raw, status), verdicts in zip(found[::2], found[1::2], strict=True)
            if _is_open(raw, status)
        ]

    def pngs(self, job_id: str, indices: Sequence[int]) -> list[bytes]:
        found: list[Any] = list(self.connection.hmget(png_key(job_id), [str(index) for index in indices]))
        if missing := [index for index, png in zip(indices, found, strict=True) if png is None]:
            raise KeyError(f"job {job_id} has no pictures {missing}")
        return found

    def say_alive(self, name: str, about: dict[str, Any]) -> None:
        """Worker `name` lives for another `lease_s`."""
        self._say_alive([WORKERS, worker_key(name)], [name, json.dumps(about), int(self.settings.lease_s * 1000)])

    def say_gone(self, name: str) -> None:
        with self.connection.pipeline(transaction=True) as pipe:
            pipe.srem(WORKERS, name)
            pipe.delete(worker_key(name))
            pipe.execute()

    def workers(self) -> list[dict[str, Any]]:
        """What the live workers say of themselves."""
        keys = [worker_key(text(name)) for name in self.connection.smembers(WORKERS)]
        return [json.loads(raw) for raw in self.connection.mget(keys) if raw is not None] if keys else []

    def is_alive(self, name: str) -> bool:
        return bool(self.connection.exists(worker_key(name)))

    def sweep(self) -> None:
        """Puts right what RQ lost: an open job without an RQ job that waits or runs gets a new one; overdue ones fail.

        Cheap and safe to call at any time from any worker: a job that is run twice finds its pictures done. One sweep
        looks at some of the open jobs, the next goes on from there. Redis's clock says what is overdue: those of API
        and workers may be wrong.
        """
        self._sweep_at, found = self.connection.sscan(OPEN, self._sweep_at, count=SWEPT)
        job_ids = {text(raw) for raw in found} | self._lost_once
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(job_key(job_id), ["status", "rq", "overdue_at"])
            pipe.time()
            pipe.lrange(self.queue.key, 0, -1)
            *states, (now, _), queue = pipe.execute()
        waiting, lost = set(queue), set[str]()
        for job_id, (status, rq, overdue_at) in zip(job_ids, states, strict=True):
            if status is None or text(status) not in ACTIVE:
                self.connection.srem(OPEN, job_id)
                continue
            if overdue_at is None:  # created by an API of before there were deadlines
                all_of_it = (job_key, verdicts_key, png_key, events_key, pending_key)
                with self.connection.pipeline(transaction=False) as pipe:
                    self._set_deadline(pipe, [key(job_id) for key in all_of_it])
                    pipe.execute()
            elif now >= int(overdue_at):
                self.fail(job_id, "not finished in the time that a job has")  # its own, whatever is set here
                continue
            if rq not in waiting and self._rq_lost(job_id):
                lost.add(job_id)
        if any(status is None for status, *_ in states):
            shares.recount(self.connection)
        # RQ's own steps between queue and worker are not atomic: only what is missing twice in a row is lost.
        twice, self._lost_once = lost & self._lost_once, lost
        for job_id in twice:
            self.requeue(job_id)
            self._lost_once.discard(job_id)
        if dead := [name for name in self.connection.smembers(WORKERS) if not self.is_alive(text(name))]:
            self.connection.srem(WORKERS, *dead)

    def requeue(self, job_id: str) -> None:
        """Gives the job a new RQ job; its pictures stay where they are."""
        with self.connection.pipeline(transaction=True) as pipe:
            pipe.multi()
            pipe.hset(job_key(job_id), "rq", self._enqueue(job_id, pipe))
            pipe.execute()
        if (record := self.record(job_id)) is not None:
            _log("job queued again", record)

    def _rq_lost(self, job_id: str) -> bool:
        rq_id = self.connection.hget(job_key(job_id), "rq")
        if rq_id is None:
            return True
        try:
            job = RqJob.fetch(text(rq_id), connection=self.connection, serializer=JSONSerializer)
        except NoSuchJobError:
            return True
        status = job.get_status(refresh=False)
        if status == "queued":
            return self.connection.lpos(self.queue.key, text(rq_id)) is None
        return not (status == "started" and job.worker_name and self.is_alive(job.worker_name))


def _is_open(record: bytes | None, status: bytes | None) -> bool:
    return record is not None and status is not None and text(status) in ACTIVE


def read_verdicts(raw: Iterable[bytes | str]) -> list[Verdict]:
    """Verdicts as Redis keeps them, by index."""
    return sorted((Verdict.model_validate_json(one) for one in raw), key=lambda verdict: verdict.index)


def _log(event: str, record: JobRecord, **about: Any) -> None:
    """A line with the ids of a job and of the request that made it, whoever's work it is written in."""
    log.info(event, **record.log_ids, age_s=round(time.time() - record.created_at, 3), **about)
