"""Jobs as workers see them: move their status, store their pictures, read their records.

The moves themselves are in `jobs.lua`. The status in Redis is the truth; RQ only wakes workers. Knows no HTTP, no torch
and no files; `keys.py` lists the keys.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from redis import Redis

from service.contract.records import TERMINAL, FinishedPicture, JobRecord, JobResult, JobStatus, Verdict
from service.settings import Settings
from service.store import functions, keys
from service.store.claims import Claim, PictureStream
from service.store.connection import text
from service.store.doorbell import Doorbell, ModelName
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.telemetry.metrics import JOBS_ENDED

log = get_logger(__name__)

OVERDUE = "not finished within the time limit for a job"


class JobStore:
    """The jobs of one Redis, for code that may block."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection, self.settings = connection, settings
        self.doorbell = Doorbell(connection, settings.queue)

    def unfinished(self, pictures: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
        """Mark queued jobs as running. Return those of the pictures, given by job and index, that are still to be made.

        They are not finished, and their jobs are open.
        """
        asked = defaultdict[str, set[int]](set)
        for job_id, index in pictures:
            asked[job_id].add(index)
        if not asked:
            return set()
        arguments: list[Any] = []
        for job_id, indices in asked.items():
            arguments += [job_id, len(indices), *indices]
        answers = functions.call(self.connection, "begin", time.time(), *arguments)
        left = set[tuple[str, int]]()
        for (job_id, indices), answer in zip(asked.items(), answers, strict=True):
            if answer is None:
                continue
            has_moved, record, finished = answer
            if has_moved:
                self._moved(job_id, "running", {}, record)
            left |= {(job_id, index) for index in indices.difference(map(int, finished))}
        return left

    def fail(self, job_id: str, reason: str) -> bool:
        """End the job; clients read `reason`. False if it had ended before."""
        return self._end_early(job_id, "failed", {"error": reason})

    def cancel(self, job_id: str) -> bool:
        """End the job for its client; workers drop its pictures at their next step. False if it had ended before."""
        return self._end_early(job_id, "cancelled", {})

    def _end_early(self, job_id: str, status: JobStatus, about: dict[str, Any]) -> bool:
        fields = {"finished_at": time.time(), **about}
        answer = functions.call(
            self.connection, "end_early", self.settings.keep_s, job_id, status, *functions.flat(fields)
        )
        if answer is None:
            return False
        self._moved(job_id, status, about, answer)
        return True

    def delete(self, job_id: str) -> bool:
        """Remove an ended job; False if it has not ended, or is gone. Its files are not here."""
        return bool(functions.call(self.connection, "delete", job_id))

    def overdue(self) -> list[str]:
        """Return the open jobs whose time is over. Redis's clock decides: those of API and workers may be wrong."""
        return [text(raw) for raw in functions.call(self.connection, "overdue")]

    def fail_overdue(self) -> None:
        for job_id in self.overdue():
            self.fail(job_id, OVERDUE)

    def wanted(self) -> list[ModelName]:
        """Return the models that have work which no live worker has taken."""
        found = functions.call(self.connection, "wanted", int(self.settings.lease_s * 1000))
        return [ModelName.model_validate_json(about) for _, about in found]

    def of_model(self, digest: str) -> list[str]:
        """Return the open jobs of a model."""
        return [text(raw) for raw in functions.call(self.connection, "jobs_of", digest)]

    def finish(self, stream: PictureStream, results: Sequence[tuple[Claim, JobResult]]) -> set[str]:
        """End jobs whose grids are in storage, each given by its claim, and return those that ended now.

        The others had ended before, or lack pictures.
        """
        if not results:
            return set()
        arguments: list[Any] = []
        for claim, result in results:
            arguments += [claim.entry, claim.job, result.write()]
        keep_s = self.settings.keep_s
        answers = functions.call(self.connection, "finish", keep_s, stream.digest, time.time(), *arguments)
        ended = set()
        for (claim, _), answer in zip(results, answers, strict=True):
            if answer is not None:
                self._moved(claim.job, "finished", {}, answer)
                ended.add(claim.job)
        return ended

    def _moved(self, job_id: str, status: JobStatus, about: dict[str, Any], raw: bytes | None) -> None:
        """Log and count a move, given the job's record as the function returned it. `error` in `about`: the reason."""
        known: dict[str, Any] = {"job_id": job_id}
        try:
            if raw is not None:
                record = JobRecord.read(raw)
                known |= {**record.log_ids, "age_s": round(time.time() - record.created_at, 3)}
                if status == "running":
                    tracing.record("queue", record.traceparent, {"job_id": job_id}, record.created_at)
        except ValueError as error:  # another version wrote it, and this one cannot read it
            log.warning("job record cannot be read", job_id=job_id, reason=str(error))
        log.info(f"job {status}", **known, **({"reason": about["error"]} if "error" in about else {}))
        if status in TERMINAL:
            JOBS_ENDED.labels(status).inc()

    def commit(
        self,
        stream: PictureStream,
        finished: Sequence[tuple[str, FinishedPicture]],
        results: Mapping[tuple[str, int], JobResult] | None = None,
    ) -> tuple[list[Claim], set[str]]:
        """Store the verdicts of pictures whose files are in storage, each given with its stream entry.

        `results`: a job of one picture ends at once, with this result. If two workers sampled the same picture, the
        first verdict is kept. Pictures of an ended job are dropped. Return the grids to compose, which are claimed for
        this worker, and the jobs that do not exist any more, whose files may go.
        """
        arguments: list[Any] = []
        for entry, one in finished:
            result = (results or {}).get(one.picture.key)
            arguments += [entry, *one.picture.key, one.verdict.write(), result.write() if result else ""]
        about = (self.settings.keep_s, stream.digest, stream.consumer, time.time())
        answers, leased = functions.call(self.connection, "commit", *about, *arguments)
        gone = set()
        for (_, one), answer in zip(finished, answers, strict=True):
            job_id = one.picture.job
            if isinstance(answer, bytes):
                self._moved(job_id, "finished", {}, answer)
            elif answer == -1:
                gone.add(job_id)
        return stream.read(leased), gone

    def record(self, job_id: str) -> JobRecord | None:
        """Return the job's record; None if it is gone. ValueError if this version of the service cannot read it."""
        raw = self.connection.hget(keys.job(job_id), "record")
        return None if raw is None else JobRecord.read(raw)

    def complete(self, job_id: str) -> tuple[JobRecord, list[Verdict]] | None:
        """Return record and verdicts of a job if it is open and has all pictures.

        ValueError if this version cannot read them.
        """
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.hmget(keys.job(job_id), ["record", "status", "total"])
            pipe.hvals(keys.verdicts(job_id))
            (raw, status, total), verdicts = pipe.execute()
        if raw is None or text(status) in TERMINAL or len(verdicts) < int(total):
            return None
        return JobRecord.read(raw), read_verdicts(verdicts)

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
        found = self.connection.zmscore(keys.OPEN, ids)
        return {job_id for job_id, overdue_at in zip(ids, found, strict=True) if overdue_at is None}

    def done_count(self, job_id: str) -> int:
        return self.connection.hlen(keys.verdicts(job_id))


def read_verdicts(raw: Iterable[bytes | str]) -> list[Verdict]:
    """Parse verdicts as stored, sorted by index."""
    return sorted((Verdict.read(one) for one in raw), key=lambda verdict: verdict.index)
