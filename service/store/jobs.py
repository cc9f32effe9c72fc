"""Jobs as workers see them: move their status, store their pictures, read their records.

The moves themselves are in `jobs.lua`. The status in Redis is the truth; RQ only wakes workers. Knows no HTTP, no torch
and no files; `keys.py` lists the keys.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from redis import Redis

from service.contract.records import TERMINAL, FinishedPicture, JobRecord, JobResult, JobStatus, ModelName, Verdict
from service.settings import Settings
from service.store import keys
from service.store.claims import BegunClaim, Claim, PictureStream
from service.store.connection import concerns_all
from service.store.functions import call
from service.store.workers import Doorbell
from service.telemetry import tracing
from service.telemetry.boundary import confined
from service.telemetry.logs import get_logger
from service.telemetry.metrics import JOBS_ENDED

log = get_logger(__name__)

OVERDUE = "not finished within the time limit for a job"
RECORDS = 8  # that stay parsed: of a large job, pictures are claimed again and again
ENDED: Final = 2  # as `commit` and `finish` of `jobs.lua` answer
GONE: Final = -1


class JobStore:
    """The jobs of one Redis, for code that may block."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection, self.settings, self.keep_s = connection, settings, settings.keep_s
        self.doorbell = Doorbell(connection, settings.queue)

    def begin(self, stream: PictureStream, claims: Sequence[Claim]) -> list[BegunClaim]:
        """Mark queued jobs of claims as running. Return the claims to work on.

        Discards those whose picture is finished or whose job is not open, and leaves those of jobs that this version of
        the service cannot read to other workers.
        """
        indices: dict[str, list[int]] = {claim.job: [] for claim in claims}
        for claim in claims:
            if claim.index is not None:
                indices[claim.job].append(claim.index)
        arguments = [part for job_id, of_job in indices.items() for part in (job_id, len(of_job), *of_job)]
        answers = call(self.connection, "begin", *arguments)
        records = dict[str, JobRecord | None]()  # of open jobs; None for one that cannot be read
        finished = set[tuple[str, int | None]]()
        for job_id, answer in zip(indices, answers, strict=True):
            if answer is not None:
                has_moved, raw, stored = answer
                records[job_id] = record = read_record(job_id, raw, _parse)
                finished |= {(job_id, int(index)) for index in stored}
                if has_moved:
                    self._moved(job_id, "running", record)
        begun, unneeded, unreadable = list[BegunClaim](), list[str](), list[Claim]()
        for claim in claims:
            if claim.job not in records or (claim.job, claim.index) in finished:
                unneeded.append(claim.entry)
            elif (record := records[claim.job]) is None:
                unreadable.append(claim)
            else:
                begun.append(BegunClaim(**vars(claim), record=record))
        if unneeded:
            stream.discard(unneeded)
        if unreadable:
            stream.leave(unreadable)
        return begun

    def fail(self, job_id: str, reason: str) -> bool:
        """End the job; clients read `reason`. False if it had ended before."""
        return self._end_early(job_id, "failed", reason)

    def cancel(self, job_id: str) -> bool:
        """End the job for its client; workers drop its pictures at their next step. False if it had ended before."""
        return self._end_early(job_id, "cancelled")

    def _end_early(self, job_id: str, status: JobStatus, reason: str = "") -> bool:
        fields = ["error", reason] if reason else []
        raw = call(self.connection, "end_early", self.keep_s, job_id, status, *fields)
        if raw is None:
            return False
        self._moved(job_id, status, read_record(job_id, raw, JobRecord.read), reason)
        return True

    def delete(self, job_id: str) -> bool:
        """Remove an ended job; False if it has not ended, or is gone. Its files are not here."""
        return bool(call(self.connection, "delete", job_id))

    def fail_overdue(self) -> None:
        """Fail the open jobs whose time is over. Redis's clock decides: those of API and workers may be wrong."""
        for job_id in call(self.connection, "overdue"):
            with confined("job", passes=concerns_all, job_id=job_id):
                self.fail(job_id, OVERDUE)

    def wanted(self) -> list[ModelName]:
        """Return the models that have work which no live worker has taken."""
        found = list[ModelName]()
        for digest, about in call(self.connection, "wanted", int(self.settings.lease_s * 1000)):
            with confined("model", digest=digest):
                found.append(ModelName.model_validate_json(about))
        return found

    def of_model(self, digest: str) -> list[str]:
        """Return the open jobs of a model."""
        ids: Any = self.connection.zrange(keys.OPEN, 0, -1)
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(keys.job(job_id), "digest")
            return [job_id for job_id, found in zip(ids, pipe.execute(), strict=True) if found == digest]

    def commit(
        self,
        stream: PictureStream,
        finished: Sequence[tuple[BegunClaim, FinishedPicture]],
        results: Mapping[str, JobResult],
    ) -> tuple[list[BegunClaim], set[str]]:
        """Store the verdicts of pictures whose files are in storage, each given with its claim.

        `results`: of the jobs of one picture that end at once. If two workers sampled the same picture, the first
        verdict is kept. Pictures of an ended job are dropped. Return the grids to compose, which are claimed for this
        worker, and the jobs that do not exist any more, whose files may go.
        """
        arguments: list[Any] = []
        for claim, one in finished:
            result = results[claim.job].model_dump_json() if claim.job in results else ""
            arguments += [claim.entry, *one.picture.key, one.verdict.model_dump_json(), result]
        about = self.keep_s, stream.digest, stream.consumer
        answers, leased = call(self.connection, "commit", *about, *arguments)
        gone = self._gone(stream, [claim for claim, _ in finished], answers)
        records = {claim.job: claim.record for claim, _ in finished}
        claims = stream.read(leased)
        complete = [claim for claim in claims if claim.index is None and claim.job in records]
        if others := [claim.entry for claim in claims if claim not in complete]:
            stream.release(others)
        return [BegunClaim(**vars(claim), record=records[claim.job]) for claim in complete], gone

    def finish(self, stream: PictureStream, results: Sequence[tuple[BegunClaim, JobResult | None]]) -> set[str]:
        """End jobs whose grids are in storage, each given by its claim, unless they have ended or lack pictures.

        Removes all of the claims. Return the jobs that do not exist any more, whose files may go.
        """
        arguments: list[Any] = []
        for claim, result in results:
            arguments += [claim.entry, claim.job, result.model_dump_json() if result else ""]
        answers = call(self.connection, "finish", self.keep_s, stream.digest, *arguments)
        return self._gone(stream, [claim for claim, _ in results], answers)

    def _gone(self, stream: PictureStream, claims: Sequence[BegunClaim], answers: Sequence[int]) -> set[str]:
        """Note which claims and jobs ended, and return the jobs that do not exist, as `commit` and `finish` answer."""
        stream.held.difference_update(claim.entry for claim in claims)
        for claim, answer in zip(claims, answers, strict=True):
            if answer == ENDED:
                self._moved(claim.job, "finished", claim.record)
        return {claim.job for claim, answer in zip(claims, answers, strict=True) if answer == GONE}

    def _moved(self, job_id: str, status: JobStatus, record: JobRecord | None, reason: str = "") -> None:
        """Log and count a move. `record`: None if it cannot be read."""
        about: dict[str, Any] = {"job_id": job_id, **({"reason": reason} if reason else {})}
        if record is not None:
            about |= {**record.log_ids, "age_s": round(time.time() - record.created_at, 3)}
            if status == "running":
                tracing.span("queue", record.traceparent, {"job_id": job_id}, record.created_at).end()
        log.info(f"job {status}", **about)
        if status in TERMINAL:
            JOBS_ENDED.labels(status).inc()

    def verdicts(self, job_id: str, total: int) -> list[Verdict] | None:
        """Return the verdicts of a job, sorted by index, if it is open and has all of its `total` pictures; else None.

        ValueError if this version cannot read them.
        """
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.hget(keys.job(job_id), "status")
            pipe.hvals(keys.verdicts(job_id))
            status, verdicts = pipe.execute()
        if status is None or status in TERMINAL or len(verdicts) < total:
            return None
        return sorted(map(Verdict.model_validate_json, verdicts), key=lambda verdict: verdict.index)

    def ended(self, job_ids: Iterable[str]) -> set[str]:
        """Return those of the jobs that have ended, or are gone. One command, for it is asked before every step."""
        if not (ids := list(job_ids)):
            return set()
        found = self.connection.zmscore(keys.OPEN, ids)
        return {job_id for job_id, overdue_at in zip(ids, found, strict=True) if overdue_at is None}


_parse = lru_cache(RECORDS)(JobRecord.model_validate_json)


def read_record(job_id: str, raw: str, parse: Callable[[str], JobRecord]) -> JobRecord | None:
    """Parse a job's record, or log why this version of the service cannot read it."""
    try:
        return parse(raw)
    except ValueError as error:
        log.warning("job record cannot be read", job_id=job_id, reason=str(error))
        return None
