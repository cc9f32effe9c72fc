"""Jobs as clients see them, read from Redis without blocking. Writes nothing and knows no HTTP."""

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping

from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.contract import answers
from service.contract.errors import ExpiredJob, NotReady, ServiceError, Unavailable, UnknownJob, UnknownPicture
from service.contract.job_ids import ID, created_at
from service.contract.records import TERMINAL, JobRecord, JobResult, Verdict
from service.contract.schemas import Job, JobPage
from service.store import keys
from service.store.connection import text
from service.store.hub import Hub
from service.store.pipeline import Pipeline
from service.store.workers import ReadyWorkers
from service.telemetry.logs import get_logger

log = get_logger(__name__)

HEAD = b"record", b"status", b"started_at", b"finished_at", b"error"  # of a job in a list; its result may be large
LOOK_AGAIN_S = 5.0  # how often one who waits looks at the job itself, in case its end was not heard


class JobReader:
    """Reads jobs, the queue and the workers."""

    def __init__(self, connection: Redis, keep_s: float) -> None:
        """`keep_s`: how long jobs are kept."""
        self.redis, self.hub, self.keep_s = Pipeline(connection), Hub(connection), keep_s
        self.workers = ReadyWorkers(self.redis)

    async def job(self, job_id: str) -> Job:
        """Return the job in its current state. UnknownJob, ExpiredJob; Unavailable if another version wrote it."""
        ((pairs, verdicts, shown),) = await self.redis.call("read", job_id)
        if not pairs:
            raise await self._gone(job_id)
        fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
        record, state = _parsed(job_id, fields)
        result = JobResult.read(fields[b"result"]) if b"result" in fields else None
        done = verdicts if result is None else record.total
        return answers.whole(record, state, done, result, [Verdict.read(raw) for raw in shown if raw])

    async def _gone(self, job_id: str) -> ServiceError:
        """Return the error for a job that is not in Redis."""
        if ID.fullmatch(job_id) and await self.redis.now() - created_at(job_id) > self.keep_s:
            return ExpiredJob.of(job_id)
        return UnknownJob(f"there is no job {job_id!r}")

    async def check_owner(self, job_id: str, owner: str) -> None:
        """UnknownJob if the job belongs to another owner, as if it did not exist; ExpiredJob if it is too old to."""
        if ID.fullmatch(job_id) is None:  # it comes from a request and becomes a key, perhaps one of another kind
            raise await self._gone(job_id)
        whose = await self.redis("HGET", keys.job(job_id), "owner")
        if whose is None:
            raise await self._gone(job_id)
        if text(whose) != owner:
            raise UnknownJob(f"there is no job {job_id!r}")

    async def page(self, owner: str, limit: int, cursor: str | None) -> JobPage:
        """Return up to `limit` of an owner's jobs, newest first; `cursor`: the previous page's `next`."""
        last = f"({cursor}" if cursor else "+"
        found = await self.redis("ZREVRANGEBYLEX", keys.index(owner), last, "-", "LIMIT", 0, limit + 1)
        members = [text(raw) for raw in found]
        ids = [member.partition("-")[2] for member in members[:limit]]
        stored = await self.redis.ask(*(("HMGET", keys.job(job_id), *HEAD) for job_id in ids))
        counts = await self.redis.ask(*(("HLEN", keys.verdicts(job_id)) for job_id in ids))
        heads = []
        for job_id, values, done in zip(ids, stored, counts, strict=True):
            fields = {name: value for name, value in zip(HEAD, values, strict=True) if value is not None}
            if fields:  # otherwise the job has expired
                with contextlib.suppress(Unavailable):  # the list is of use without a job of another version
                    heads.append(answers.head(*_parsed(job_id, fields), done))
        return JobPage(jobs=heads, next=members[limit - 1] if len(members) > limit else None)

    async def wait(self, job_id: str, timeout_s: float, gone: asyncio.Future[None], is_new: bool = False) -> Job:
        """Wait until the job ends, `timeout_s` pass, the client is gone or the shutdown's deadline comes.

        Return the job. `is_new`: it was created a moment ago, so that it need not be looked at first.
        """
        deadline, away_since = time.monotonic() + timeout_s, math.inf
        with self.hub.watch(job_id, end_only=True) as watch:
            gone.add_done_callback(lambda _: watch.heard.set())
            has_ended = watch.has_ended or not (is_new or await self._is_open(job_id))
            while not (has_ended or gone.done()):
                left_s = min(deadline, self.hub.deadline) - time.monotonic()
                if left_s <= 0:
                    break
                await watch.wait(min(left_s, LOOK_AGAIN_S))
                try:
                    has_ended = watch.has_ended or not (gone.done() or await self._is_open(job_id))
                    away_since = math.inf
                except RedisError:  # perhaps for a moment only
                    away_since = min(away_since, time.monotonic())
                    if time.monotonic() - away_since >= LOOK_AGAIN_S:
                        raise
        return await self.job(job_id)

    async def _is_open(self, job_id: str) -> bool:
        status = await self.redis("HGET", keys.job(job_id), "status")
        return status is not None and text(status) not in TERMINAL

    async def check_picture(self, job_id: str, index: int) -> None:
        """Raise why a job has no such picture: UnknownPicture, NotReady, ExpiredJob if the job or its file is gone."""
        status, total = await self.redis("HMGET", keys.job(job_id), "status", "total")
        if status is None or total is None:
            raise await self._gone(job_id)
        if index >= int(total):
            raise UnknownPicture(f"the job has the pictures 0 to {int(total) - 1}, not {index}")
        if await self.redis("HEXISTS", keys.verdicts(job_id), index):
            raise ExpiredJob.of(job_id)
        raise NotReady.of(f"picture {index}", text(status))

    async def record(self, job_id: str) -> JobRecord:
        """Return a job as requested. UnknownJob, ExpiredJob; Unavailable if another version wrote it."""
        raw = await self.redis("HGET", keys.job(job_id), "record")
        if raw is None:
            raise await self._gone(job_id)
        return _parsed(job_id, {b"record": raw})[0]

    async def longest_wait_s(self, digest: str) -> float:
        """Return the age of the oldest job that is next for its owner; 0 if none is pending."""
        owners = await self.redis("ZRANGE", keys.owners(digest), 0, -1)
        firsts = await self.redis.ask(*(("LINDEX", keys.owner_jobs(digest, text(owner)), 0) for owner in owners))
        asked = await self.redis.ask(*(("HGET", keys.job(text(first)), "asked_at") for first in firsts if first))
        now = await self.redis.now()
        return max([0.0, *(now - float(at) for at in asked if at)])


def _parsed(job_id: str, fields: Mapping[bytes, bytes]) -> tuple[JobRecord, dict[str, str]]:
    """Parse a job's record, and its other fields. Unavailable if another version of the service wrote it and this one
    cannot read it."""
    try:
        return JobRecord.read(fields[b"record"]), {name.decode(): value.decode() for name, value in fields.items()}
    except ValueError as error:
        log.warning("job record cannot be read", job_id=job_id, reason=str(error))
        detail = f"job {job_id!r} was created by a newer version of the service than this process; try again"
        raise Unavailable(detail, headers={"Retry-After": "2"}) from error
