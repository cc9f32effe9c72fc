"""Jobs in Redis: move their status, store their pictures, read their records. `creation.py` has how they are created.

The moves themselves are in `jobs.lua`. The status in Redis is the truth; RQ only wakes workers. Knows no HTTP, no torch
and no files; `keys.py` lists the keys.
"""

import functools
import json
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
from service.store import creation, functions, keys
from service.store.connection import text
from service.store.idempotency import IdempotentRequest
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.telemetry.metrics import JOBS_ENDED

log = get_logger(__name__)
KEPT_EVENTS = 1000  # per job, as in `jobs.lua`


class JobStore:
    """The jobs of one Redis, for code that may block."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection, self.settings = connection, settings
        # JSON, because RQ's default unpickles what it reads from Redis.
        self.queue = Queue(settings.queue, connection=connection, serializer=JSONSerializer)

    def create(
        self,
        record: JobRecord,
        request: IdempotentRequest | None = None,
        uploaded: Sequence[bytes] = (),
        expected_bytes: int = 0,
    ) -> str:
        """Create a job, as `creation.JobCreator` does."""
        new = creation.NewJob(record, request, uploaded, expected_bytes)
        answer = functions.call(self.connection, "create", *new.arguments(self.settings, self.queue))
        return new.outcome(answer, self.settings)

    def requeue(self, job_id: str) -> None:
        """Give the job a new RQ job; its pictures stay where they are."""
        rq_job = creation.rq_job(self.queue, job_id)
        raw = functions.call(self.connection, "set_rq", job_id, rq_job.id)
        if raw is not None:  # otherwise the job was deleted
            self.queue.enqueue_job(rq_job)
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
        """Mark jobs, given with indices of pictures, as running. Return the answer of `begin` for each."""
        if not indices:
            return {}
        arguments: list[Any] = []
        for job_id, of_job in indices.items():
            arguments += [job_id, len(of_job), *of_job]
        answers = functions.call(self.connection, "begin", time.time(), *arguments)
        found = dict(zip(indices, answers, strict=True))
        for job_id, answer in found.items():
            if answer is not None and answer[0]:
                self._moved(job_id, "running", {}, answer[2])
        return found

    def fail(self, job_id: str, reason: str) -> bool:
        """End the job; clients read `reason`. False if it had ended before."""
        return self._end_early(job_id, "failed", {"error": reason})

    def cancel(self, job_id: str) -> bool:
        """End the job for its client; workers drop its pictures at their next step. False if it had ended before."""
        return self._end_early(job_id, "cancelled", {})

    def _end_early(self, job_id: str, status: JobStatus, about: dict[str, Any]) -> bool:
        fields = {"finished_at": time.time(), **about}
        answer = functions.call(self.connection, "end_early", self._ending, job_id, status, *creation.flat(fields))
        if answer is None:
            return False
        self._moved(job_id, status, about, answer[1])
        return True

    def delete(self, job_id: str) -> bool:
        """Remove an ended job with its results; False if it has not ended, or is gone. Its tombstone stays."""
        return bool(functions.call(self.connection, "delete", job_id))

    def finish(
        self, finished: Mapping[str, tuple[JobResult, bytes]], kept: Collection[str] = (), at: float | None = None
    ) -> bool:
        """End jobs with their results and grids. False if all of them had ended before, or lack pictures.

        `kept`: those whose pictures and grids lie in storage, so that Redis drops them. `at`: when they ended.
        """
        if not finished:
            return False
        arguments: list[Any] = []
        for job_id, (result, grid) in finished.items():
            is_kept = job_id in kept
            arguments += [job_id, result.write(), b"" if is_kept else grid, len(grid), int(is_kept)]
        answers = functions.call(self.connection, "finish", self._ending, at or time.time(), *arguments)
        ended = {job_id: answer for job_id, answer in zip(finished, answers, strict=True) if answer is not None}
        for job_id, answer in ended.items():
            self._moved(job_id, "finished", {}, answer[1])
        return bool(ended)

    @functools.cached_property
    def _ending(self) -> str:
        """The settings of the functions that may end jobs."""
        ttl_s = self.settings.job_ttl_s
        return json.dumps(
            {
                "ttl_s": ttl_s,
                "remembered_s": ttl_s + self.settings.remembered_s,
                "rq_queue": self.queue.key,
                "rq_jobs": RqJob.redis_job_namespace_prefix,
            }
        )

    def _moved(self, job_id: str, status: JobStatus, about: dict[str, Any], raw: Any) -> None:
        """Log and count a move, given the function's answer. An `error` in `about` is the reason."""
        record = _readable(job_id, raw)
        _log(f"job {status}", job_id, record, **({"reason": about["error"]} if "error" in about else {}))
        if status == "running" and record is not None:
            tracing.record("queue", record.traceparent, {"job_id": job_id}, record.created_at)
        if status in TERMINAL:
            JOBS_ENDED.labels(status).inc()

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
        arguments: list[Any] = []
        for entry, one in finished:
            verdict, png, trajectory = one.verdict.write(), one.png, one.trajectory or b""
            size = len(verdict.encode()) + len(png) + len(trajectory)
            if one.picture.key in kept:
                png = trajectory = b""
            result = (results or {}).get(one.picture.key)
            arguments += [entry, *one.picture.key, verdict, png, trajectory, size, result.write() if result else ""]
        answers = functions.call(self.connection, "commit", self._ending, stream, time.time(), *arguments)
        complete = set()
        for (_, one), answer in zip(finished, answers, strict=True):
            job_id = one.picture.job
            if isinstance(answer, list):
                self._moved(job_id, "finished", {}, answer[1])
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
