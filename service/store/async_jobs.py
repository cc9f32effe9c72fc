"""Jobs as clients see them: created, read and awaited without blocking the event loop.

Builds the content of answers, URLs of pictures included, and raises the service's errors; knows no requests and no
routes. `jobs.py` has what workers do with jobs.
"""

import asyncio
import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.contract.errors import (
    ExpiredJob,
    KeyReuse,
    NotReady,
    ServiceError,
    Unavailable,
    UnknownJob,
    UnknownPicture,
)
from service.contract.records import (
    JOB_ID,
    TERMINAL,
    JobRecord,
    JobResult,
    JobSummary,
    Verdict,
    created_at,
)
from service.contract.schemas import (
    AttemptResult,
    GenerateResult,
    Job,
    JobHead,
    JobPage,
    PictureResult,
    Repeat,
    ScoreResult,
    Summary,
)
from service.settings import Settings
from service.store import keys, workers
from service.store.connection import concerns_all
from service.store.forecast import FairQueue, Forecast, OpenJob, WorkerSpeed
from service.store.functions import Pipeline
from service.store.hub import Hub
from service.store.jobs import read_record
from service.store.workers import ReadyWorkers
from service.telemetry.boundary import confined
from service.telemetry.logs import get_logger
from shared.options import SamplingOptions

log = get_logger(__name__)

# Of a job in a list: only small fields.
HEAD = "summary", "status", "total", "started_at", "finished_at", "error", "reason"
WHOLE = "record", *HEAD[1:], "dispatched", "result"
LOOK_AGAIN_S = 5.0  # how often one who waits looks at the job itself, in case its end was not heard
IDEMPOTENT_S = 86_400  # how long an Idempotency-Key counts, at most as long as its job; about 300 bytes each
DIGITS = 6  # of scores and distances
QUEUE_SHARE = 0.05  # of the API's time may go into reading queues for forecasts more often than every FRESH_S


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
        return keys.key(_hash(f"{self.owner}:{self.key}"))  # an owner's name has no colon

    def job_of(self, value: str) -> str:
        """Return the job in what Redis stores under `redis_key`. KeyReuse if it belongs to another request."""
        job_id, _, request = value.partition(" ")
        if request != _hash(self.request):
            message = "the key was used for another request; a new request needs a new key"
            raise KeyReuse.at(("header", "Idempotency-Key"), message)
        return job_id


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def limits_of(settings: Settings) -> dict[str, int]:
    """Return the arguments of `create` in `jobs.lua` that are the same for all jobs."""
    own = settings.has_keys
    return {
        "timeout_s": settings.job_timeout_s,
        "lifetime_s": settings.job_timeout_s + settings.keep_s,
        "idempotent_s": min(IDEMPOTENT_S, settings.keep_s),
        "most_queued": settings.max_queued_pictures,
        "most_own": settings.max_queued_pictures_per_owner if own else 0,
        "most_stored": settings.max_stored_pictures_per_owner if own else 0,
    }


def open_job(record: JobRecord, dispatched: int = 0, done: int = 0) -> OpenJob:
    """Return a job as forecasts see it. An uploaded picture costs no network rows."""
    cost = 0.0 if record.uploaded else record.options.cost
    return OpenJob(record.id, record.owner, record.total, dispatched, done, cost)


def arguments(record: JobRecord, request: IdempotentRequest | None, limits: Mapping[str, int]) -> list[Any]:
    """Return all arguments of `create`."""
    about = {
        "owner": record.owner,
        "total": record.total,
        "draws": record.draws,
        "cost": open_job(record).cost,
        **limits,
    }
    if record.deadline_s is not None:
        about["deadline_s"] = record.deadline_s
    if record.webhook:
        about["webhook_events"] = " ".join(record.webhook_events)
    if request is not None:
        about |= {"request_key": request.redis_key, "request_hash": _hash(request.request)}
    return [json.dumps(about), record.model_dump_json(exclude_defaults=True), record.summary]


def before(answer: Any, request: IdempotentRequest | None) -> str:
    """Return the job that the same request created before, if `create` answers so instead of creating one.

    KeyReuse if its key stands for another request, NoRoom if the job does not fit.
    """
    what, found, *most = answer
    if what == "request":
        assert request is not None
        return request.job_of(found)
    raise NoRoom(what, found, *most)


class AsyncJobs:
    """The jobs of one Redis, with its queue and workers, for the event loop."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.redis, self.hub, self.settings = Pipeline(connection), Hub(connection), settings
        self.workers = ReadyWorkers(self.redis)
        self._limits = limits_of(settings)
        self._queues = dict[str, tuple[float, FairQueue]]()  # by digest, with when to read it again
        self._record = asyncio.Lock()  # while one is read for a list

    async def known(self, request: IdempotentRequest | None) -> str | None:
        """Return the job that the same request created before, if it still exists. Nothing is the same as None.

        KeyReuse if the key stands for another request, whose job is there.
        """
        if request is None:
            return None
        raw = await self.redis("GET", request.redis_key)
        if raw is None or not await self.redis("EXISTS", keys.job(raw.partition(" ")[0])):
            return None
        return request.job_of(raw)

    async def create(self, record: JobRecord, request: IdempotentRequest | None = None) -> str:
        """Write a job, put it into the queue and wake a worker, in one command. Return the job's id.

        If the same request created a job before, write nothing and return that job's id. KeyReuse, NoRoom as `before`.
        """
        self.hub.expect(record.id)
        answer = await self.redis.call("create", *arguments(record, request, self._limits))
        if answer is not None:
            return before(answer, request)
        return record.id

    async def job(self, job_id: str) -> Job:
        """Return the job in its current state. UnknownJob, ExpiredJob; Unavailable if another version wrote it."""
        values, done, shown = await self.redis.call("read", job_id, *WHOLE)
        fields = {name: value for name, value in zip(WHOLE, values, strict=True) if value is not None}
        if not fields:
            raise await self._gone(job_id)
        record = read_record(job_id, fields["record"], JobRecord.read)
        if record is None:
            raise _unreadable(job_id)
        if "result" in fields:
            about = _head(record, fields, int(fields["total"]))
            result = JobResult.model_validate_json(fields["result"])
            about["result"] = _result(record, result, [Verdict.model_validate_json(raw) for raw in shown if raw])
        else:
            about = _head(record, fields, done)
        if about["status"] not in TERMINAL:
            problems = [worker.get("storage_problem") for worker in await self.workers()]
            about["delay"] = next(filter(None, problems), None)
            about |= await self.eta(record.digest, open_job(record, int(fields["dispatched"]), done))
        return Job.model_validate(about)

    async def forecast(self, digest: str, job: OpenJob) -> Forecast | None:
        """Return when a job of a model will be done, queued or not.

        None for uploaded pictures, which have no cost, and if no worker has a rate.
        """
        if not job.cost:
            return None
        speeds = [
            WorkerSpeed(model["rows_per_s"], model["max_pictures"])
            for about in await self.workers()
            for model in about.get("models", ())
            if model["digest"] == digest and "max_pictures" in model  # workers of the last release say neither
        ]
        return (await self._queue(digest)).forecast(job, speeds)

    async def eta(self, digest: str, job: OpenJob) -> dict[str, Any]:
        """Return the fields of a job that say when it will be done, if that is known."""
        found = await self.forecast(digest, job)
        return {"ahead": found.ahead, "eta": _iso(await self.redis.now() + found.seconds)} if found else {}

    async def _queue(self, digest: str) -> FairQueue:
        """Return the open jobs of a model as they were a moment ago.

        That is 20 times as long as reading them takes (QUEUE_SHARE), but a second at most, however slow Redis was.
        """
        begun = time.monotonic()
        again_at, queue = self._queues.get(digest, (-math.inf, None))
        if queue is None or begun >= again_at:
            queue = FairQueue(
                OpenJob(id_, owner, int(total), int(dispatched), done, float(cost or SamplingOptions().cost))
                for id_, owner, total, dispatched, done, cost in await self.redis.call("queue", digest)
            )
            now = time.monotonic()
            self._queues[digest] = now + min(workers.FRESH_S, (now - begun) / QUEUE_SHARE), queue
        return queue

    async def _gone(self, job_id: str) -> ServiceError:
        """Return the error for a job that is not in Redis."""
        if JOB_ID.fullmatch(job_id) and await self.redis.now() - created_at(job_id) > self.settings.keep_s:
            return ExpiredJob.of(job_id)
        return UnknownJob(f"there is no job {job_id!r}")

    async def check_owner(self, job_id: str, owner: str) -> None:
        """UnknownJob if the job belongs to another owner, as if it did not exist; ExpiredJob if it is too old to."""
        if JOB_ID.fullmatch(job_id) is None:  # it comes from a request and becomes a key, perhaps one of another kind
            raise await self._gone(job_id)
        whose = await self.redis("HGET", keys.job(job_id), "owner")
        if whose is None:
            raise await self._gone(job_id)
        if whose != owner:
            raise UnknownJob(f"there is no job {job_id!r}")

    async def page(self, owner: str, limit: int, cursor: str | None) -> JobPage:
        """Return up to `limit` of an owner's jobs, newest first; `cursor`: the previous page's `next`."""
        last = f"({cursor}" if cursor else "+"
        members = await self.redis("ZREVRANGEBYLEX", keys.jobs(owner), last, "-", "LIMIT", 0, limit + 1)
        ids = [member.partition("-")[2] for member in members[:limit]]
        heads = await asyncio.gather(*map(self._listed, ids))  # in one turn of the event loop: in one pipeline
        return JobPage(jobs=[*filter(None, heads)], next=members[limit - 1] if len(members) > limit else None)

    async def _listed(self, job_id: str) -> JobHead | None:
        """Return a job of a list; None for one that has expired or cannot be read, which hides no others.

        Versions that know no summaries may have created the job: its record, one at a time and not on the event loop,
        has the same fields.
        """
        with confined("record", passes=concerns_all, job_id=job_id):
            head, done = ("HMGET", keys.job(job_id), *HEAD), ("HLEN", keys.verdicts(job_id))
            values, count = await self.redis.ask(head, done)
            fields = {name: value for name, value in zip(HEAD, values, strict=True) if value is not None}
            if raw := fields.get("summary"):
                return JobHead.model_validate(_head(JobSummary.read(raw), fields, count))
            async with self._record:
                if fields and (raw := await self.redis("HGET", keys.job(job_id), "record")):
                    summary = await asyncio.to_thread(JobSummary.read, raw)
                    return JobHead.model_validate(_head(summary, fields, count))
        return None

    async def wait(self, job_id: str, timeout_s: float, gone: asyncio.Future[None]) -> bool:
        """Wait until the job ends, `timeout_s` pass, the client is gone or the shutdown's deadline comes.

        Return whether it has ended.
        """
        deadline, away_since = time.monotonic() + timeout_s, math.inf
        with self.hub.watch(job_id) as watch:
            gone.add_done_callback(lambda _: watch.heard.set())
            while not gone.done():
                try:
                    if not (watch.is_new or watch.has_ended):
                        status = await self.redis("HGET", keys.job(job_id), "status")
                        watch.has_ended |= status is None or status in TERMINAL
                    if watch.has_ended:
                        return True
                    away_since, watch.is_new = math.inf, False
                except RedisError:  # perhaps for a moment only
                    away_since = min(away_since, time.monotonic())
                    if time.monotonic() - away_since >= LOOK_AGAIN_S:
                        raise
                left_s = min(deadline, self.hub.deadline) - time.monotonic()
                if left_s <= 0:
                    break
                await watch.wait(min(left_s, LOOK_AGAIN_S))
        return False

    async def grid(self, job_id: str) -> int | None:
        """Return the index of the picture that is a finished job's grid; None if the grid has a file of its own.

        NotReady until the job is finished; UnknownJob, ExpiredJob.
        """
        status, shown, picture = await self.redis("HMGET", keys.job(job_id), "status", "shown", "grid")
        if status is None:
            raise await self._gone(job_id)
        if status != "finished":
            raise NotReady.of("the grid", status)
        if shown is None:  # the release before ended it
            result = (job := await self.job(job_id)).result
            alone = job.seed is not None and result is not None and len(result.pictures) == 1
            return getattr(result, "best", 0) if alone else None
        return None if picture is None else int(picture)

    async def check_picture(self, job_id: str, index: int) -> None:
        """Raise why a job has no such picture: UnknownPicture, NotReady, ExpiredJob if the job or its file is gone."""
        status, total = await self.redis("HMGET", keys.job(job_id), "status", "total")
        if status is None or total is None:
            raise await self._gone(job_id)
        if index >= int(total):
            raise UnknownPicture(f"the job has the pictures 0 to {int(total) - 1}, not {index}")
        if await self.redis("HEXISTS", keys.verdicts(job_id), index):
            raise ExpiredJob.of(job_id)
        raise NotReady.of(f"picture {index}", status)

    async def record(self, job_id: str) -> JobRecord:
        """Return a job as requested. UnknownJob, ExpiredJob; Unavailable if it has options of another version."""
        raw = await self.redis("HGET", keys.job(job_id), "record")
        if raw is None:
            raise await self._gone(job_id)
        record = read_record(job_id, raw, JobRecord.model_validate_json)
        if record is None:
            raise _unreadable(job_id)
        return record

    async def longest_wait_s(self, digest: str) -> float:
        """Return the age of the oldest job that is next for its owner; 0 if none is pending."""
        owners = await self.redis("ZRANGE", keys.turns(digest), 0, -1)
        firsts = await self.redis.ask(*(("LINDEX", keys.turns_of(digest, owner), 0) for owner in owners))
        now = await self.redis.now()
        return max([0.0, *(now - created_at(first) for first in firsts if first)])


def _unreadable(job_id: str) -> Unavailable:
    """Return the error for a job that another version of the service wrote and this one cannot read."""
    detail = f"job {job_id!r} was created by a newer version of the service than this process; try again"
    return Unavailable(detail, headers={"Retry-After": "2"})


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def _head(about: JobSummary, fields: Mapping[str, str], done: int) -> dict[str, Any]:
    """Return what clients see of a job, but its result. `about`: its summary, or the whole record."""
    times = {"created_at": about.created_at}
    times |= {name: float(fields[name]) for name in ("started_at", "finished_at") if name in fields}
    uploaded = {"seed": None, "options": None} if about.uploaded else {}
    return {
        **vars(about),
        "status": fields["status"],
        "error": fields.get("error"),
        "reason": fields.get("reason"),
        "started_at": None,
        "finished_at": None,
        **{name: _iso(at) for name, at in times.items()},
        **uploaded,
        "progress": {"done": done, "total": int(fields["total"])},
        "result": None,
    }


def _result(record: JobRecord, result: JobResult, verdicts: Sequence[Verdict]) -> GenerateResult | ScoreResult:
    """Build the result that clients see; `verdicts`: those of its best repeat, then of its worst pictures."""
    shown = [
        PictureResult(
            **verdict.shown(DIGITS),
            labels=list(verdict.labels),
            seed=None if record.uploaded else verdict.seed,
            url=f"/jobs/{record.id}/images/{verdict.index}.png",
            trajectory_url=f"/jobs/{record.id}/trajectories/{verdict.index}.png" if record.trajectory else None,
            kept=verdict.attempt if record.options.until else None,
            attempts=[AttemptResult(seed=one.seed, **one.shown(DIGITS)) for one in verdict.attempts] or None,
        )
        for verdict in verdicts
    ]
    shown, worst = shown[: len(record.labels)], shown[len(record.labels) :]
    grid_url = f"/jobs/{record.id}/grid.png"
    if record.kind == "generate":
        selected = record.options.until is not None
        return GenerateResult(**vars(result.repeats[0]), selected=selected, grid_url=grid_url, pictures=shown)
    repeats = [
        Repeat(**vars(scores), seed=None if record.uploaded else record.seed + r)
        for r, scores in enumerate(result.repeats)
    ]
    summaries: dict[str, Any] = {
        name: _summary([getattr(scores, name) for scores in result.repeats])
        for name in ("accuracy", "exact_match", "f1")
    }
    return ScoreResult(
        repeats=repeats,
        **summaries,
        best=result.best,
        by_label=result.by_label,
        by_objects=result.by_objects,
        worst=worst,
        grid_url=grid_url,
        pictures=shown,
    )


def _summary(values: Sequence[float]) -> Summary:
    return Summary(max=max(values), mean=statistics.fmean(values), std=statistics.pstdev(values))
