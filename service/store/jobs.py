"""Jobs as workers see them: move their status, store their pictures, read their records.

The moves themselves are in `jobs.lua`. The status in Redis is the truth; RQ runs the workers. Knows no HTTP, no torch
and no files; `keys.py` lists the keys.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any

from redis import Redis

from service.contract.records import TERMINAL, FinishedPicture, JobRecord, JobResult, JobStatus, ModelName, Verdict
from service.settings import Settings
from service.store import keys
from service.store.claims import BegunClaim, Claim, PictureStream
from service.store.connection import concerns_all
from service.store.functions import call
from service.telemetry import tracing
from service.telemetry.boundary import confined
from service.telemetry.logs import get_logger
from service.telemetry.metrics import JOBS_ENDED

log = get_logger(__name__)

OVERDUE = {
    "timeout": "not finished within the time limit for a job",
    "deadline": "it could not be finished by the deadline of its request",
}
RECORDS = 8  # that stay parsed: of a large job, pictures are claimed again and again
UNREADABLE = "a worker cannot read the job, which another version of the service created: upgrade the workers first"


class JobStore:
    """The jobs of one Redis, for code that may block."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection, self.settings, self.keep_s = connection, settings, settings.keep_s

    def claim_new(self, stream: PictureStream, room: int) -> list[BegunClaim]:
        """Claim up to `room` pending pictures, in the fair queue's order, and begin their jobs. Return the claims."""
        leased, answers = call(self.connection, "claim", stream.digest, stream.consumer, room)
        return self._begun(stream, stream.read(leased), answers)

    def take_over(self, stream: PictureStream, room: int, *, may_be_alone: bool) -> list[BegunClaim]:
        """Take over up to `room` claims whose leases have expired; fail the jobs of hopeless ones. As `claim_stale`."""
        claims, hopeless = stream.claim_stale(room, may_be_alone=may_be_alone)
        for claim, reason in hopeless:
            with confined("job", passes=concerns_all, job_id=claim.job):
                self.fail(claim.job, reason)
                stream.discard([claim.entry])
        return self.begin(stream, claims)

    def begin(self, stream: PictureStream, claims: Sequence[Claim]) -> list[BegunClaim]:
        """Mark queued jobs of claims as running. Return the claims to work on, as `_begun`."""
        if not claims:
            return []
        indices: dict[str, list[int]] = {claim.job: [] for claim in claims}
        for claim in claims:
            if claim.index is not None:
                indices[claim.job].append(claim.index)
        return self._begun(stream, claims, call(self.connection, "begin", json.dumps([*indices.items()])))

    def _begun(self, stream: PictureStream, claims: Sequence[Claim], answers: Sequence[Any]) -> list[BegunClaim]:
        """Return the claims to work on, given what `begin` of `jobs.lua` answers.

        Discards those whose picture is finished or whose job is not open, and fails jobs that this version of the
        service cannot read.
        """
        records, finished = dict[str, JobRecord](), set[tuple[str, int | None]]()
        for job_id, what, raw, stored in answers:
            with confined("job", partial(self.fail, job_id), concerns_all, job_id=job_id):
                if what == "damaged":
                    raise ValueError(raw)
                record = read_record(job_id, raw, _parse)
                if what == "begun":
                    self._moved(job_id, "running", record)
                if record is None:
                    self.fail(job_id, UNREADABLE)
                else:
                    finished |= {(job_id, int(index)) for index in stored}
                    records[job_id] = record
        wanted = [claim for claim in claims if claim.job in records and (claim.job, claim.index) not in finished]
        if unneeded := [claim.entry for claim in claims if claim not in wanted]:
            stream.discard(unneeded)
        return [BegunClaim(**vars(claim), record=records[claim.job]) for claim in wanted]

    def fail(self, job_id: str, reason: str, *, by_deadline: bool = False) -> bool:
        """End the job; clients read `reason`. `by_deadline`: of its own. False if it had ended before."""
        return self._end_early(job_id, "failed", {"error": reason, **({"reason": "deadline"} if by_deadline else {})})

    def cancel(self, job_id: str) -> bool:
        """End the job for its client; workers drop its pictures at their next step. False if it had ended before."""
        return self._end_early(job_id, "cancelled", {})

    def _end_early(self, job_id: str, status: JobStatus, fields: Mapping[str, str]) -> bool:
        raw = call(self.connection, "end_early", self.keep_s, job_id, status, json.dumps(fields))
        if raw is None:
            return False
        self._moved(job_id, status, read_record(job_id, raw, JobRecord.read), fields.get("error", ""))
        return True

    def delete(self, job_id: str) -> bool:
        """Remove an ended job; False if it has not ended, or is gone. Its files are not here."""
        return bool(call(self.connection, "delete", job_id))

    def exists(self, job_id: str) -> bool:
        return bool(self.connection.exists(keys.job(job_id)))

    def fail_overdue(self) -> None:
        """Fail the open jobs whose time is over, or that cannot meet their deadline any more.

        Redis's clock decides: those of API and workers may be wrong.
        """
        for job_id, why in call(self.connection, "overdue"):
            with confined("job", passes=concerns_all, job_id=job_id):
                self.fail(job_id, OVERDUE[why], by_deadline=why == "deadline")

    def wanted(self) -> list[ModelName]:
        """Return the models that have work which no live worker has taken."""
        found = list[ModelName]()
        for digest, about in call(self.connection, "wanted", int(self.settings.lease_s * 1000)):
            with confined("model", digest=digest):
                found.append(ModelName.model_validate_json(about))
        return found

    def of_model(self, digest: str) -> list[str]:
        """Return the open jobs of a model."""
        return [job_id for job_id, *_ in call(self.connection, "queue", digest)]

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
        pictures = []
        for claim, one in finished:
            picture = {"entry": claim.entry, "job": claim.job, "index": claim.index}
            ending = {"fields": results[claim.job].fields(claim.record)} if claim.job in results else {}
            pictures.append({**picture, "verdict": one.verdict.model_dump_json(exclude_defaults=True), **ending})
        about = self.keep_s, stream.digest, stream.consumer, json.dumps(pictures)
        answers, leased = call(self.connection, "commit", *about)
        claims = [claim for claim, _ in finished]
        gone = self._ended(stream, claims, answers)
        records, own = {claim.job: claim.record for claim in claims}, dict[str, list[Verdict]]()
        for (claim, one), answer in zip(finished, answers, strict=True):
            if answer == "stored":
                own.setdefault(claim.job, []).append(one.verdict)
        grids, others = list[BegunClaim](), list[str]()
        for grid in stream.read(leased):
            if grid.index is None and (record := records.get(grid.job)) is not None:
                verdicts = own.get(grid.job, [])
                verdicts = sorted(verdicts, key=attrgetter("index")) if len(verdicts) == record.total else []
                grids.append(BegunClaim(**vars(grid), record=record, verdicts=verdicts))
            else:
                others.append(grid.entry)
        if others:
            stream.release(others)
        return grids, gone

    def finish(self, stream: PictureStream, results: Sequence[tuple[BegunClaim, JobResult | None]]) -> set[str]:
        """End jobs whose grids are in storage, each given by its claim, unless they have ended or lack pictures.

        Removes all of the claims. Return the jobs that do not exist any more, whose files may go.
        """
        grids = []
        for claim, result in results:
            ending = {"fields": result.fields(claim.record)} if result else {}
            grids.append({"entry": claim.entry, "job": claim.job, **ending})
        answers = call(self.connection, "finish", self.keep_s, stream.digest, json.dumps(grids))
        return self._ended(stream, [claim for claim, _ in results], answers)

    def _ended(self, stream: PictureStream, claims: Sequence[BegunClaim], answers: Sequence[str]) -> set[str]:
        """Note which claims and jobs ended, and return the jobs that do not exist, as `commit` and `finish` answer."""
        stream.leased.difference_update(claim.entry for claim in claims)
        for claim, answer in zip(claims, answers, strict=True):
            if answer == "finished":
                self._moved(claim.job, "finished", claim.record)
        return {claim.job for claim, answer in zip(claims, answers, strict=True) if answer == "gone"}

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
        return sorted(map(Verdict.model_validate_json, verdicts), key=attrgetter("index"))

    def ended(self, job_ids: Iterable[str]) -> set[str]:
        """Return those of the jobs that have ended, or are gone. One command, for it is asked before every step."""
        if not (ids := list(job_ids)):
            return set()
        found = self.connection.zmscore(keys.DEADLINES, ids)
        return {job_id for job_id, overdue_at in zip(ids, found, strict=True) if overdue_at is None}


_parse = lru_cache(RECORDS)(JobRecord.model_validate_json)


def read_record(job_id: str, raw: str, parse: Callable[[str], JobRecord]) -> JobRecord | None:
    """Parse a job's record, or log why this version of the service cannot read it."""
    try:
        return parse(raw)
    except ValueError as error:
        log.warning("job record cannot be read", job_id=job_id, reason=str(error))
        return None
