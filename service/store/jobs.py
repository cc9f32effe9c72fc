"""Jobs in Redis: move their status, store their pictures, read their records. `creation.py` has how they are created.

The status in Redis is the truth; RQ only wakes workers. Knows no HTTP, no torch and no files; `keys.py` lists the keys.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from service.contract.records import ACTIVE, TERMINAL, FinishedPicture, JobRecord, JobResult, JobStatus, Verdict
from service.settings import Settings
from service.store import admission, claims, creation, fair_queue, keys, webhook_outbox
from service.store.connection import best_effort, text
from service.store.idempotency import IdempotentRequest
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.telemetry.metrics import JOBS_ENDED

log = get_logger(__name__)
KEPT_ENDINGS = 1000  # of all jobs; a client whose job's end it missed looks at the job itself after seconds
KEPT_EVENTS = 1000  # per job; a client that missed older ones reads the job itself
RECENT_S = 60  # a kept job's verdicts and events stay in Redis so long, for clients that wait for it or follow it

# Marks queued jobs as running. Returns for each job whether it moved, whether a webhook is due, its record, and which
# of some pictures are finished, by index; nil for a job that is not open. Its first write needs no memory, so that it
# runs on a full Redis too.
# KEYS: for each job: job, events, verdicts. ARGV: time, events kept, then for each job: id, number of indices, indices.
_BEGIN = f"""
redis.call('HDEL', KEYS[1], '')
local to, found, used = 'running', {{}}, 2
for i = 1, #KEYS, 3 do
  local id, first, moved, due, done = ARGV[used + 1], used + 3, 0, 0, {{}}
  used = used + 2 + ARGV[used + 2]
  local status, wanted, record = unpack(redis.call('HMGET', KEYS[i], 'status', 'webhook_events', 'record'))
  if status == 'queued' then
    moved = 1
    redis.call('HSET', KEYS[i], 'status', to, 'started_at', ARGV[1])
    redis.call('XADD', KEYS[i + 1], 'MAXLEN', '~', ARGV[2], '*', 'status', to)
    {webhook_outbox.ADD_IF_WANTED}
  elseif status == to and used >= first then
    for k, verdict in ipairs(redis.call('HMGET', KEYS[i + 2], unpack(ARGV, first, used))) do
      if verdict then table.insert(done, ARGV[first + k - 1]) end
    end
  end
  table.insert(found, (moved == 1 or status == to) and {{moved, due, record, done}} or false)
end
return found
"""

# Parts of the scripts that end a job. Its RQ job goes too, unless a worker has taken it: a job sampled in another one's
# batch rarely needs its own. If storage keeps the job, it alone has the verdicts and events after `recent_s`; else that
# is 0. The other locals are set by `_END` and `_COMMIT`.
_STATE = """local status, total, owner, bytes, rq, wanted, record = unpack(redis.call('HMGET', job,
  'status', 'total', 'owner', 'bytes', 'rq', 'webhook_events', 'record'))"""
_MOVE_TO_END = f"""
redis.call('SREM', open, id)
redis.call('HSET', job, 'status', to, unpack(fields))
redis.call('XADD', events, 'MAXLEN', '~', kept_events, '*', 'status', to, unpack(last))
redis.call('XADD', '{keys.ENDED}', 'MAXLEN', '~', {KEPT_ENDINGS}, '*', 'job', id)
if rq and redis.call('LREM', rq_queue, 1, rq) == 1 then redis.call('DEL', rq_jobs .. rq) end
{admission.COUNT_STORED}
redis.call('EXPIRE', job, ttl_s)
if to ~= 'finished' then redis.call('SET', tombstone, owner or '', 'EX', remembered_s) end -- it may be gone by now
if grid ~= '' then redis.call('HSET', pngs, '{keys.GRID}', grid) end
if recent_s == '0' then
  redis.call('EXPIRE', pngs, ttl_s)
else
  -- only an open job needs these; without them it fits a smaller piece of memory
  redis.call('HDEL', job, 'rq', 'overdue_at', 'asked_at', 'digest')
  redis.call('HSET', job, 'kept', 1)
  redis.call('DEL', pngs)
end
-- a webhook says what is in Redis, and may be late
local recent = recent_s ~= '0' and not wanted and math.min(recent_s, ttl_s) or ttl_s
redis.call('EXPIRE', events, recent)
redis.call('EXPIRE', verdicts, recent)
local due = 0
{webhook_outbox.ADD_IF_WANTED}
"""

# Ends a job: queued or running -> a terminal status, which is final. The pictures of one that ends early leave queue
# and stream in the same script: if no worker has their model, nobody else removes them. A job without all of its
# pictures does not finish: a Redis that came back from a crash, or a former replica, may have lost some since the
# caller saw them. Its first write needs no memory, so that it runs on a full Redis too.
# Returns whether a webhook is due, and the job's record; nil if the job does not move.
# ARGV ends with fields and values to set in the job.
_END = f"""
local open, rq_queue, job, events, verdicts, pngs, tombstone = unpack(KEYS)
local ttl_s, remembered_s, kept_events, rq_jobs, id, to, grid, grid_bytes, recent_s = unpack(ARGV, 1, 9)
local fields, last = {{unpack(ARGV, 10)}}, {{}}
{_STATE}
if status ~= 'queued' and status ~= 'running' then return nil end
if to == 'finished' and redis.call('HLEN', verdicts) < tonumber(total) then return nil end
{_MOVE_TO_END}
if to ~= 'finished' then
  {fair_queue.REMOVE}
  {claims.REMOVE}
end
return {{due, record}}
"""

# Stores pictures whose jobs are open and that no other worker stored before, and removes all of them from the stream,
# at the end, so that an error leaves them there. Its first write needs no memory, so that it runs on a full Redis too.
# Returns for each 1 if its job then has all of its pictures, else 0. A job of one picture ends at once if the picture
# comes with a result: then the answer is as of `_END`. A PNG or trajectory may be "": there is none, or storage has it.
# KEYS: stream, open jobs, RQ's queue, then for each picture five of its job. ARGV: five, the stream's entries, then
# nine for each picture.
_COMMIT = f"""
local stream, open, rq_queue = unpack(KEYS, 1, 3)
local ttl_s, remembered_s, kept_events, rq_jobs, group = unpack(ARGV, 1, 5)
local to, recent_s, count = 'finished', '0', (#KEYS - 3) / 5
local entries = {{unpack(ARGV, 6, 5 + count)}}
redis.call('HDEL', KEYS[4], '')
local function store(of_job, about)
  local job, events, verdicts, pngs, tombstone = unpack(of_job)
  local id, index, verdict, png, trajectory_field, trajectory, size, finished_at, result = unpack(about)
  {_STATE}
  if status ~= 'queued' and status ~= 'running' then return 0 end
  local is_new = redis.call('HSETNX', verdicts, index, verdict) == 1
  local ends = is_new and total == '1' and result ~= ''
  if is_new then
    local stored = ends and {{'{keys.GRID}', index}} or {{}}
    if png ~= '' then stored = {{index, png, unpack(stored)}} end
    if trajectory ~= '' then stored = {{trajectory_field, trajectory, unpack(stored)}} end
    if #stored > 0 then redis.call('HSET', pngs, unpack(stored)) end
    if owner ~= '' then bytes = redis.call('HINCRBY', job, 'bytes', size) end
    if not ends then redis.call('XADD', events, 'MAXLEN', '~', kept_events, '*', 'picture', index) end
  end
  if total ~= '1' then return redis.call('HLEN', verdicts) >= tonumber(total) and 1 or 0 end
  if not ends then return 1 end
  local fields, last = {{'finished_at', finished_at, 'result', result}}, {{'last_picture', index}}
  local grid, grid_bytes = '', #index
  {_MOVE_TO_END}
  return {{due, record}}
end
local answers = {{}}
for i = 1, count do
  local about = 5 + count + 9 * i
  answers[i] = store({{unpack(KEYS, 5 * i - 1, 5 * i + 3)}}, {{unpack(ARGV, about - 8, about)}})
end
redis.call('XACK', stream, group, unpack(entries))
redis.call('XDEL', stream, unpack(entries))
return answers
"""

# Notes a job's new RQ job and returns the job's record. Not if the job was deleted meanwhile: the field would bring it
# back, without a record and for ever.
# KEYS: job. ARGV: the RQ job's id.
_SET_RQ = """
local record = redis.call('HGET', KEYS[1], 'record')
if record then redis.call('HSET', KEYS[1], 'rq', ARGV[1]) end
return record
"""

# Removes an ended job and its results, and keeps its tombstone. Its first write needs no memory, so that it runs on a
# full Redis too. Returns whether it did.
# KEYS: job, verdicts, PNGs, events.
_DELETE = f"""
local status = redis.call('HGET', KEYS[1], 'status')
if not status or status == 'queued' or status == 'running' then return 0 end
redis.call('HDEL', KEYS[1], '')
{admission.UNCOUNT_STORED}
redis.call('DEL', unpack(KEYS))
return 1
"""


class JobStore:
    """The jobs of one Redis, for code that may block."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection, self.settings = connection, settings
        # JSON, because RQ's default unpickles what it reads from Redis.
        self.queue = Queue(settings.queue, connection=connection, serializer=JSONSerializer)
        self.webhooks = Queue(settings.webhook_queue, connection=connection, serializer=JSONSerializer)

    def create(
        self,
        record: JobRecord,
        request: IdempotentRequest | None = None,
        uploaded: Sequence[bytes] = (),
        expected_bytes: int = 0,
    ) -> str:
        """Create a job, as `creation.JobCreator` does."""
        new = creation.NewJob(record, request, uploaded, expected_bytes)
        return new.outcome(self.connection.eval(*new.script(self.settings, self.queue)), self.settings)

    def requeue(self, job_id: str) -> None:
        """Give the job a new RQ job; its pictures stay where they are."""
        rq_job = creation.rq_job(self.queue, job_id)
        with self.connection.pipeline(transaction=True) as pipe:
            pipe.multi()  # first: after a command RQ would call it itself, which is an error
            self.queue.enqueue_job(rq_job, pipeline=pipe)
            pipe.eval(_SET_RQ, 1, keys.job(job_id), rq_job.id)
            *_, raw = pipe.execute()
        _log("job queued again", job_id, _readable(job_id, raw))

    def begin(self, *job_ids: str) -> bool:
        """Mark jobs as running. False if none of them was queued."""
        answers = self._begin(dict.fromkeys(job_ids, ()))
        return any(answer is not None and answer[0] for answer in answers.values())

    def unfinished(self, pictures: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
        """Mark queued jobs as running. Return those of the pictures, given by job and index, that are still to be made.

        They are not finished, and their jobs are open.
        """
        asked = defaultdict[str, set[int]](set)
        for job_id, index in pictures:
            asked[job_id].add(index)
        answers = {job_id: answer for job_id, answer in self._begin(asked).items() if answer is not None}
        return {(i, index) for i, (*_, done) in answers.items() for index in asked[i].difference(map(int, done))}

    def _begin(self, indices: Mapping[str, Collection[int]]) -> dict[str, Any]:
        """Mark queued jobs as running, and return the script's answer for each job, given with indices of pictures."""
        if not indices:
            return {}
        touched = [key(job_id) for job_id in indices for key in (keys.job, keys.events, keys.verdicts)]
        arguments: list[Any] = [time.time(), KEPT_EVENTS]
        for job_id, of_job in indices.items():
            arguments += [job_id, len(of_job), *of_job]
        answers: Any = self.connection.eval(_BEGIN, len(touched), *touched, *arguments)
        found = dict(zip(indices, answers, strict=True))
        for job_id, answer in found.items():
            if answer is not None and answer[0]:
                self._moved(job_id, "running", {}, *answer[1:3])
        return found

    def fail(self, job_id: str, reason: str) -> bool:
        """End the job; clients read `reason`. False if it had ended before."""
        return self._end("failed", {job_id: {"finished_at": time.time(), "error": reason}})

    def cancel(self, job_id: str) -> bool:
        """End the job for its client; workers drop its pictures at their next step. False if it had ended before."""
        return self._end("cancelled", {job_id: {"finished_at": time.time()}})

    def delete(self, job_id: str) -> bool:
        """Remove an ended job with its results; False if it has not ended, or is gone. Its tombstone stays."""
        touched = [key(job_id) for key in (keys.job, keys.verdicts, keys.png, keys.events)]
        return bool(self.connection.eval(_DELETE, len(touched), *touched))

    def finish(
        self, finished: Mapping[str, tuple[JobResult, bytes]], kept: Collection[str] = (), at: float | None = None
    ) -> bool:
        """End jobs with their results and grids. False if all of them had ended before, or lack pictures.

        `kept`: those whose pictures and grids lie in storage, so that Redis drops them. `at`: when they ended.
        """
        now, grids = at or time.time(), {job_id: grid for job_id, (_, grid) in finished.items()}
        fields = {i: {"finished_at": now, "result": result.write()} for i, (result, _) in finished.items()}
        return self._end("finished", fields, grids, kept)

    def _end(
        self,
        status: JobStatus,
        jobs: Mapping[str, dict[str, Any]],
        grids: Mapping[str, bytes] | None = None,
        kept: Collection[str] = (),
    ) -> bool:
        """End jobs, given by id with the fields to set in each, in one round trip. Whether one was open."""
        if not jobs:
            return False
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id, fields in jobs.items():
                touched = [keys.OPEN, self.queue.key, *_ended(job_id)]
                grid, is_kept = (grids or {}).get(job_id, b""), job_id in kept
                arguments = [*self._ending(), job_id, status]
                arguments += [b"" if is_kept else grid, len(grid), RECENT_S if is_kept else 0, *creation.flat(fields)]
                # EVAL rather than EVALSHA: a Redis that restarted in between does not know the script.
                pipe.eval(_END, len(touched), *touched, *arguments)
            answers = pipe.execute()
        ended = {job_id: answer for job_id, answer in zip(jobs, answers, strict=True) if answer is not None}
        for job_id, (webhook_is_due, raw) in ended.items():
            self._moved(job_id, status, jobs[job_id], webhook_is_due, raw)
        return bool(ended)

    def _ending(self) -> list[Any]:
        """Return the first arguments of the scripts that may end jobs."""
        ttl_s = self.settings.job_ttl_s
        return [ttl_s, ttl_s + self.settings.remembered_s, KEPT_EVENTS, RqJob.redis_job_namespace_prefix]

    def _moved(self, job_id: str, status: JobStatus, fields: dict[str, Any], webhook_is_due: int, raw: Any) -> None:
        """Log, count and announce a move, given the script's answer."""
        record = _readable(job_id, raw)
        _log(f"job {status}", job_id, record, **({"reason": fields["error"]} if "error" in fields else {}))
        if status == "running" and record is not None:
            tracing.record("queue", record.traceparent, {"job_id": job_id}, record.created_at)
        if status in TERMINAL:
            JOBS_ENDED.labels(status).inc()
        if webhook_is_due:
            with best_effort():  # the webhooks' worker finds it in the outbox anyway
                webhook_outbox.enqueue(self.webhooks, job_id, status)

    def commit(
        self,
        stream: str,
        finished: Sequence[tuple[str, FinishedPicture]],
        kept: Collection[tuple[str, int]] = (),
        results: Mapping[tuple[str, int], JobResult] | None = None,
    ) -> set[str]:
        """Store pictures, each given with its stream entry, and return the open jobs that are now complete.

        `kept`: pictures, by job and index, whose PNGs lie in storage: Redis gets their verdicts only. `results`: a job
        of one picture ends at once, with this result and the picture as its grid. If two workers sampled the same
        picture, the first one stored is kept. Pictures of an ended job are dropped.
        """
        now, complete = time.time(), set()
        written = {key: result.write() for key, result in (results or {}).items()}
        touched = [stream, keys.OPEN, self.queue.key, *(key for _, one in finished for key in _ended(one.picture.job))]
        arguments = [*self._ending(), claims.GROUP, *(entry for entry, _ in finished)]
        for _, one in finished:
            job_id, index = one.picture.key
            verdict, png, trajectory = one.verdict.write(), one.png, one.trajectory or b""
            size = len(verdict.encode()) + len(png) + len(trajectory)
            if one.picture.key in kept:
                png = trajectory = b""
            arguments += [job_id, index, verdict, png, keys.trajectory_field(index), trajectory, size]
            arguments += [now, written.get(one.picture.key, "")]
        answers: Any = self.connection.eval(_COMMIT, len(touched), *touched, *arguments)
        for (_, one), answer in zip(finished, answers, strict=True):
            job_id, index = one.picture.key
            if isinstance(answer, list):
                self._moved(job_id, "finished", {"finished_at": now}, *answer)
            elif answer:
                complete.add(job_id)
        return complete

    def record(self, job_id: str) -> JobRecord | None:
        """Return the job's record; None if it is gone. ValueError if this version of the service cannot read it."""
        raw = self.connection.hget(keys.job(job_id), "record")
        return None if raw is None else JobRecord.read(raw)

    def open_verdicts(self, job_ids: Iterable[str]) -> list[tuple[JobRecord, list[Verdict]]]:
        """Return record and verdicts of each job that is open, has all pictures, and can be read by this version."""
        ids = list(job_ids)
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hmget(keys.job(job_id), ["record", "status", "total"])
                pipe.hvals(keys.verdicts(job_id))
            found = pipe.execute()
        return [
            (record, read_verdicts(verdicts))
            for job_id, (raw, status, total), verdicts in zip(ids, found[::2], found[1::2], strict=True)
            if status is not None and text(status) in ACTIVE and len(verdicts) >= int(total)
            if (record := _readable(job_id, raw)) is not None
        ]

    def statuses(self, job_ids: Iterable[str]) -> dict[str, str | None]:
        """Return the status of each job; None for one that is gone."""
        ids = list(job_ids)
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(keys.job(job_id), "status")
            return {i: None if raw is None else text(raw) for i, raw in zip(ids, pipe.execute(), strict=True)}

    def ended(self, job_ids: Iterable[str]) -> set[str]:
        """Return those of the jobs that have ended, or are gone. One command, for it is asked before every step."""
        if not (ids := list(job_ids)):
            return set()
        found = self.connection.smismember(keys.OPEN, ids)
        return {job_id for job_id, is_open in zip(ids, found, strict=True) if not is_open}

    def is_open(self, job_id: str) -> bool:
        return self.statuses([job_id])[job_id] in ACTIVE

    def done_count(self, job_id: str) -> int:
        return self.connection.hlen(keys.verdicts(job_id))

    def owners(self, job_ids: Iterable[str]) -> dict[str, str]:
        """Return the owner of each job that exists."""
        ids = list(job_ids)
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(keys.job(job_id), "owner")
            return {i: text(raw) for i, raw in zip(ids, pipe.execute(), strict=True) if raw is not None}

    def started_at(self, job_id: str) -> float | None:
        raw = self.connection.hget(keys.job(job_id), "started_at")
        return None if raw is None else float(raw)

    def all_pngs(self, job_id: str) -> dict[str, bytes]:
        """Return what Redis has of a job's pictures and trajectories, by field of job:ID:png."""
        found: Any = self.connection.hgetall(keys.png(job_id))
        return {text(field): png for field, png in found.items()}

    def some_pngs(self, job_id: str, indices: Sequence[int]) -> dict[int, bytes]:
        """Return those of a job's pictures that Redis has."""
        found: list[Any] = list(self.connection.hmget(keys.png(job_id), [str(index) for index in indices]))
        return {index: png for index, png in zip(indices, found, strict=True) if png is not None}

    def pngs(self, job_id: str, indices: Sequence[int]) -> list[bytes]:
        """Return the PNGs of some of a job's pictures. KeyError if one is missing."""
        found = self.some_pngs(job_id, indices)
        if missing := [index for index in indices if index not in found]:
            raise KeyError(f"job {job_id} has no pictures {missing}")
        return [found[index] for index in indices]


def _ended(job_id: str) -> list[str]:
    """Return the keys of a job that its end touches."""
    return [key(job_id) for key in (keys.job, keys.events, keys.verdicts, keys.png, keys.tombstone)]


def read_verdicts(raw: Iterable[bytes | str]) -> list[Verdict]:
    """Parse verdicts as stored, sorted by index."""
    return sorted((Verdict.read(one) for one in raw), key=lambda verdict: verdict.index)


def _readable(job_id: str, raw: bytes | str | None) -> JobRecord | None:
    """Parse a job's record; None if it is gone, or if another version wrote it and this one cannot read it."""
    try:
        return None if raw is None else JobRecord.read(raw)
    except ValueError as error:
        log.warning("job record cannot be read", job_id=job_id, reason=str(error))
        return None


def _log(event: str, job_id: str, record: JobRecord | None, **about: Any) -> None:
    """Log an event with the ids of the job and, if its record can be read, of the request that created it."""
    known = {} if record is None else {**record.log_ids, "age_s": round(time.time() - record.created_at, 3)}
    log.info(event, **{"job_id": job_id, **known, **about})
