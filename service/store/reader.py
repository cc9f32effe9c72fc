"""Jobs as clients see them, read from Redis without blocking. Writes nothing and knows no HTTP."""

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.contract import answers
from service.contract.errors import ExpiredJob, NotReady, ServiceError, Unavailable, UnknownJob, UnknownPicture
from service.contract.job_ids import ID, created_at
from service.contract.records import TERMINAL, JobRecord, JobResult
from service.contract.schemas import Job, JobHead, JobPage
from service.store import functions, keys, workers
from service.store.clock import RedisClock
from service.store.connection import entries_of, text
from service.store.creation import id_of
from service.store.jobs import read_verdicts
from service.telemetry.logs import get_logger

log = get_logger(__name__)

ReadJobs: TypeAlias = Callable[[Sequence[str]], Awaitable[Mapping[str, Job | Unavailable]]]
Ended: TypeAlias = "asyncio.Future[Job | None]"  # done once a job has ended: with the job, or None if it was not read

RECENT = 1000  # ended jobs, for requests that begin to wait just after their job's end
LOOK_AGAIN_S = 5.0  # how often to look which awaited jobs have ended, in case an end was missed


class Endings:
    """Gives those who wait for jobs the ended ones: one read for all that wait in this process.

    It may miss an end, so now and then it looks which of their jobs are no longer open.
    """

    def __init__(self, connection: Redis, jobs: ReadJobs) -> None:
        """`jobs` reads those of several jobs that Redis has."""
        self.connection, self.jobs = connection, jobs
        self._waiting = defaultdict[str, set[Ended]](set)  # by job
        self._recent = dict[str, None]()  # the jobs whose end was read last, in order
        self._seen = "0-0"  # the entry read last
        self.looked_at = -math.inf  # when it last saw which jobs are open, in monotonic seconds
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def of(self, job_id: str) -> Iterator[Ended]:
        """Return what is done once the job has ended, if it has just ended or ends from now on."""
        ended: Ended = asyncio.get_running_loop().create_future()
        if job_id in self._recent:
            ended.set_result(None)
        self._waiting[job_id].add(ended)
        try:
            yield ended
        finally:
            self._waiting[job_id].remove(ended)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def follow(self) -> None:
        """Read on. It stops when nobody waits, and when Redis is away."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        with contextlib.suppress(RedisError):
            while self._waiting:
                left_s = self.looked_at + LOOK_AGAIN_S - time.monotonic()
                if left_s <= 0:
                    await self._look()
                    continue
                answer = await self.connection.xread({keys.ENDED: self._seen}, block=math.ceil(left_s * 1000))
                if entries := entries_of(answer):
                    self._seen = text(entries[-1][0])
                    await self._tell([text(fields[b"job"]) for _, fields in entries])

    async def _look(self) -> None:
        """Find the awaited jobs whose end was missed."""
        looked_at, job_ids = time.monotonic(), list(self._waiting)
        found = await self.connection.zmscore(keys.OPEN, job_ids)
        await self._tell([job_id for job_id, overdue_at in zip(job_ids, found, strict=True) if overdue_at is None])
        self.looked_at = looked_at

    async def _tell(self, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            self._recent[job_id] = None
            if len(self._recent) > RECENT:
                del self._recent[next(iter(self._recent))]
        awaited = [job_id for job_id in job_ids if job_id in self._waiting]
        jobs: Mapping[str, Job | Unavailable] = {}
        with contextlib.suppress(RedisError, ValueError):  # those who wait then read their jobs themselves
            jobs = await self.jobs(awaited) if awaited else {}
        for job_id in awaited:
            found = jobs.get(job_id)
            for ended in self._waiting.get(job_id, ()):
                if not ended.done():
                    ended.set_result(found if isinstance(found, Job) else None)


class JobReader:
    """Reads jobs, their pictures, the queue and the workers."""

    def __init__(self, connection: Redis, keep_s: float) -> None:
        """`keep_s`: how long jobs are kept."""
        self.connection, self.keep_s, self.clock = connection, keep_s, RedisClock(connection)
        self.endings = Endings(connection, self._jobs)
        self.stopping = False  # the server is shutting down
        self.shutdown_deadline = math.inf  # when, in monotonic seconds, waiting clients must have their answer
        self._stopped: asyncio.Future[None] | None = None  # wakes those who wait, to see the deadline

    def stop(self, within_s: float) -> None:
        """Begin the shutdown: resumable streams end now, and every wait ends within this time."""
        self.stopping, self.shutdown_deadline = True, time.monotonic() + within_s
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)

    async def job(self, job_id: str) -> Job:
        """Return the job in its current state. UnknownJob, ExpiredJob; Unavailable if another version wrote it."""
        found = (await self._jobs([job_id])).get(job_id) or await self._gone(job_id)
        if isinstance(found, ServiceError):
            raise found
        return found

    async def _jobs(self, job_ids: Sequence[str]) -> dict[str, Job | Unavailable]:
        """Return those of the jobs that Redis has, or why they cannot be read. One command for all of them."""
        found = await functions.call_async(self.connection, "read", *job_ids)
        jobs = dict[str, Job | Unavailable]()
        for job_id, (pairs, verdicts, shown) in zip(job_ids, found, strict=True):
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            best = read_verdicts(raw for raw in shown if raw is not None)
            if fields:
                try:
                    record = _record(job_id, fields[b"record"])
                    result = JobResult.read(fields[b"result"]) if b"result" in fields else None
                    done = verdicts if result is None else record.total
                    jobs[job_id] = answers.whole(record, _state(fields), done, result, best)
                except Unavailable as error:
                    jobs[job_id] = error
        return jobs

    async def _gone(self, job_id: str) -> ServiceError:
        """Return the error for a job that is not in Redis."""
        if ID.fullmatch(job_id) and await self.clock.now() - created_at(job_id) > self.keep_s:
            return ExpiredJob.of(job_id)
        return UnknownJob(f"there is no job {job_id!r}")

    async def check_owner(self, job_id: str, owner: str) -> None:
        """UnknownJob if the job belongs to another owner, as if it did not exist; ExpiredJob if it is too old to."""
        if ID.fullmatch(job_id) is None:  # it comes from a request and becomes a key, perhaps one of another kind
            raise await self._gone(job_id)
        whose = await self.connection.hget(keys.job(job_id), "owner")
        if whose is None:
            raise await self._gone(job_id)
        if text(whose) != owner:
            raise UnknownJob(f"there is no job {job_id!r}")

    async def page(self, owner: str, limit: int, cursor: str | None) -> JobPage:
        """Return up to `limit` of an owner's jobs, newest first; `cursor`: the previous page's `next`."""
        last = f"({cursor}" if cursor else "+"
        found: Any = await self.connection.zrevrangebylex(keys.index(owner), last, "-", start=0, num=limit + 1)
        members = [text(raw) for raw in found]
        heads = await self._heads(members[:limit])
        return JobPage(jobs=heads, next=members[limit - 1] if len(members) > limit else None)

    async def _heads(self, members: Sequence[str]) -> list[JobHead]:
        """Return the jobs of an owner's list that have not expired."""
        async with self.connection.pipeline(transaction=False) as pipe:
            for member in members:
                pipe.hgetall(keys.job(id_of(member)))
                pipe.hlen(keys.verdicts(id_of(member)))
            found = await pipe.execute()
        heads = []
        for member, fields, verdicts in zip(members, found[::2], found[1::2], strict=True):
            if fields:  # otherwise the job has expired
                with contextlib.suppress(Unavailable):  # the list is of use without a job of another version
                    record = _record(id_of(member), fields[b"record"])
                    heads.append(answers.head(record, _state(fields), verdicts))
        return heads

    async def wait(self, job_id: str, timeout_s: float, gone: asyncio.Future[None], is_new: bool = False) -> Job:
        """Wait until the job ends, `timeout_s` pass, the client is gone or the shutdown's deadline comes.

        Return the job. `is_new`: it was created a moment ago, so that it need not be looked at first.
        """
        status = "queued" if is_new else await self.status(job_id)
        looked_at = time.monotonic()
        deadline = looked_at + timeout_s
        with self.endings.of(job_id) as ended:
            while not (ended.done() or gone.done()):
                self.endings.follow()
                left_s = min(deadline, self.shutdown_deadline) - time.monotonic()
                if status is None or status in TERMINAL or left_s <= 0:
                    break
                wakers: list[asyncio.Future[Any]] = [ended, gone]
                if not self.stopping:
                    wakers.append(self._stop_future())
                await asyncio.wait(wakers, timeout=min(left_s, LOOK_AGAIN_S), return_when=asyncio.FIRST_COMPLETED)
                looked_at = max(looked_at, self.endings.looked_at)
                if not (ended.done() or gone.done()) and time.monotonic() - looked_at >= 1.5 * LOOK_AGAIN_S:
                    # `endings` is late, as when Redis is away: then this raises, and the client need not wait
                    looked_at, status = time.monotonic(), await self.status(job_id)
            return (ended.result() if ended.done() else None) or await self.job(job_id)

    def _stop_future(self) -> asyncio.Future[None]:
        if self._stopped is None:
            self._stopped = asyncio.get_running_loop().create_future()
        return self._stopped

    async def status(self, job_id: str) -> str | None:
        status = await self.connection.hget(keys.job(job_id), "status")
        return None if status is None else text(status)

    async def check_picture(self, job_id: str, index: int) -> None:
        """Raise why a job has no such picture: UnknownPicture, NotReady, ExpiredJob if the job or its file is gone."""
        status, total = await self.connection.hmget(keys.job(job_id), ["status", "total"])
        if status is None or total is None:
            raise await self._gone(job_id)
        if index >= int(total):
            raise UnknownPicture(f"the job has the pictures 0 to {int(total) - 1}, not {index}")
        if await self.connection.hexists(keys.verdicts(job_id), str(index)):
            raise ExpiredJob.of(job_id)
        raise NotReady.of(f"picture {index}", text(status))

    async def record(self, job_id: str) -> JobRecord:
        """Return a job as requested. UnknownJob, ExpiredJob; Unavailable if another version wrote it."""
        raw = await self.connection.hget(keys.job(job_id), "record")
        if raw is None:
            raise await self._gone(job_id)
        return _record(job_id, raw)

    async def workers(self) -> list[dict[str, Any]]:
        """Return what the live workers say about themselves, without those that are shutting down or hang."""
        return workers.ready(await workers.list_live_async(self.connection))

    async def pending_by_owner(self, digest: str) -> dict[str, int]:
        """Return how many pictures of a checkpoint are pending, by owner."""
        found = await self.connection.hgetall(keys.pending_counts(digest))
        return {text(owner): int(count) for owner, count in found.items()}

    async def longest_wait_s(self, digest: str) -> float:
        """Return the age of the oldest job that is next for its owner; 0 if none is pending."""
        owners: Any = await self.connection.zrange(keys.owners(digest), 0, -1)
        async with self.connection.pipeline(transaction=False) as pipe:
            for owner in owners:
                pipe.lindex(keys.owner_jobs(digest, text(owner)), 0)
            firsts = await pipe.execute()
            for job_id in filter(None, firsts):
                pipe.hget(keys.job(text(job_id)), "asked_at")
            asked = await pipe.execute()
        now = await self.clock.now()
        return max([0.0, *(now - float(at) for at in asked if at)])


def _record(job_id: str, raw: bytes | str) -> JobRecord:
    """Parse a job's record. Unavailable if another version of the service wrote it and this one cannot read it."""
    try:
        return JobRecord.read(raw)
    except ValueError as error:
        log.warning("job record cannot be read", job_id=job_id, reason=str(error))
        detail = f"job {job_id!r} was created by a newer version of the service than this process; try again"
        raise Unavailable(detail, headers={"Retry-After": "2"}) from error


def _state(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields.items()}
