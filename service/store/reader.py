"""Jobs as clients see them, read from Redis without blocking. Writes nothing and knows no HTTP."""

import asyncio
import contextlib
import math
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import MaxConnectionsError

from service.contract.errors import ExpiredJob, NotReady, ServiceError, Unavailable, UnknownJob, UnknownPicture
from service.contract.recipe import shown_distances, shown_scores
from service.contract.records import TERMINAL, JobRecord, JobResult, Verdict
from service.contract.schemas import (
    GenerateResult,
    Job,
    JobHead,
    JobPage,
    PictureResult,
    Progress,
    Repeat,
    ScoreResult,
    Summary,
)
from service.store import keys, workers
from service.store.connection import entries_of, text
from service.store.job_index import id_of
from service.store.jobs import read_verdicts
from service.telemetry.logs import get_logger

log = get_logger(__name__)

SCORE_DIGITS = 6
FETCHED_TOGETHER = 16  # pictures of a zip
LOOK_AGAIN_MS = 2000  # a waiting client's job is read at least this often, in case an event was missed


class JobReader:
    """Reads jobs, their pictures, the queue and the workers."""

    def __init__(self, connection: Redis, blocking: Redis | None = None) -> None:
        """`blocking`: a pool for blocking reads, so that waiting clients cannot exhaust the main one."""
        self.connection, self.blocking = connection, blocking or connection
        self.stopping = False  # the server is shutting down
        self.shutdown_deadline = math.inf  # when, in monotonic seconds, waiting clients must have their answer

    def stop(self, within_s: float) -> None:
        """Begin the shutdown: resumable streams end now, and every wait ends within this time."""
        self.stopping, self.shutdown_deadline = True, time.monotonic() + within_s

    async def job(self, job_id: str) -> Job:
        """Return the job in its current state. UnknownJob, ExpiredJob; Unavailable if another version wrote it."""
        async with self.connection.pipeline(transaction=False) as pipe:  # a full Redis refuses MULTI
            pipe.hgetall(keys.job(job_id))
            pipe.hlen(keys.verdicts(job_id))
            fields, done = await pipe.execute()
        if not fields:
            raise await self._gone(job_id)
        record = _record(job_id, fields[b"record"])
        result = None
        if b"result" in fields:
            scores = JobResult.read(fields[b"result"])
            n = len(record.labels)
            shown = [str(scores.best * n + i) for i in range(n)]
            found = await self.connection.hmget(keys.verdicts(job_id), shown)
            result = _result(record, scores, read_verdicts(one for one in found if one is not None))
        requested = {name: getattr(record, name) for name in ("labels", "layouts", "first", "trajectory", "columns")}
        return Job(**_head(record, fields, done), **requested, result=result)

    async def _gone(self, job_id: str) -> ServiceError:
        """Return the error for a job that is not in Redis."""
        if await self.connection.exists(keys.tombstone(job_id)):
            return ExpiredJob(f"the results of job {job_id!r} have expired; generate them again")
        return UnknownJob(f"there is no job {job_id!r}")

    async def check_owner(self, job_id: str, owner: str) -> None:
        """UnknownJob if the job belongs to another owner, as if it did not exist."""
        whose = await self.connection.get(keys.tombstone(job_id))
        if whose is None or text(whose) != owner:
            raise UnknownJob(f"there is no job {job_id!r}")

    async def page(self, owner: str, limit: int, cursor: str | None) -> JobPage:
        """Return up to `limit` of an owner's jobs, newest first; `cursor`: the previous page's `next`."""
        last = f"({cursor}" if cursor else "+"
        found: Any = await self.connection.zrevrangebylex(keys.index(owner), last, "-", start=0, num=limit + 1)
        members = [text(raw) for raw in found]
        async with self.connection.pipeline(transaction=False) as pipe:
            for member in members[:limit]:
                pipe.hgetall(keys.job(id_of(member)))
                pipe.hlen(keys.verdicts(id_of(member)))
            answers = await pipe.execute()
        heads = []
        for member, fields, done in zip(members, answers[::2], answers[1::2], strict=False):
            if fields:  # otherwise the job has expired
                with contextlib.suppress(Unavailable):  # the list is of use without a job of another version
                    heads.append(JobHead(**_head(_record(id_of(member), fields[b"record"]), fields, done)))
        return JobPage(jobs=heads, next=members[limit - 1] if len(members) > limit else None)

    async def wait(self, job_id: str, timeout_s: float) -> Job:
        """Wait until the job ends, `timeout_s` pass or the shutdown's deadline comes, and return the job.

        Events only wake this; the job's status decides. An event that ends no job, such as one for a picture, is
        skipped.
        """
        deadline = time.monotonic() + timeout_s
        seen, look = "0-0", True
        status: str | None = "running"
        while True:
            if look:
                status = await self.status(job_id)
            left_ms = int((min(deadline, self.shutdown_deadline) - time.monotonic()) * 1000)
            if status is None or status in TERMINAL or left_ms <= 0:
                return await self.job(job_id)
            entries = entries_of(await self.read_streams({keys.events(job_id): seen}, min(left_ms, LOOK_AGAIN_MS)))
            if entries:
                seen = text(entries[-1][0])
            look = not entries or any(text(fields.get(b"status", b"")) in TERMINAL for _, fields in entries)

    async def read_streams(self, seen: dict[Any, Any], within_ms: int) -> Any:
        """Wait for new entries of streams, given as key -> last entry seen, and return XREAD's answer.

        If the blocking pool is exhausted, sleep for that time instead and read once.
        """
        try:
            return await self.blocking.xread(seen, block=within_ms)
        except MaxConnectionsError:
            await asyncio.sleep(within_ms / 1000)
            return await self.connection.xread(seen)

    async def status(self, job_id: str) -> str | None:
        status = await self.connection.hget(keys.job(job_id), "status")
        return None if status is None else text(status)

    async def image(self, job_id: str, index: int) -> bytes:
        """Return a picture's PNG. NotReady until it is finished; UnknownJob, ExpiredJob, UnknownPicture."""
        return await self._png(job_id, str(index), f"picture {index}", index)

    async def images(self, job_id: str) -> AsyncIterator[bytes]:
        """Return the PNGs of a finished job's result, a few at a time. NotReady, UnknownJob, ExpiredJob.

        ExpiredJob also between two of them, if the job is deleted meanwhile.
        """
        status, raw, total = await self.connection.hmget(keys.job(job_id), ["status", "result", "total"])
        if status is None:
            raise await self._gone(job_id)
        if raw is None or total is None:
            detail = f"the pictures are not all ready; the job is {text(status)}"
            raise NotReady(detail, job_status=text(status))
        result = JobResult.read(raw)
        n = int(total) // len(result.repeats)
        return self._images(job_id, range(result.best * n, (result.best + 1) * n))

    async def _images(self, job_id: str, indices: range) -> AsyncIterator[bytes]:
        for first in range(0, len(indices), FETCHED_TOGETHER):
            wanted = [str(index) for index in indices[first : first + FETCHED_TOGETHER]]
            for png in await self.connection.hmget(keys.png(job_id), wanted):
                if not isinstance(png, bytes):
                    raise await self._gone(job_id)
                yield png

    async def trajectory(self, job_id: str, index: int) -> bytes:
        """Return a picture's trajectory as PNG. The same errors; UnknownPicture also if the job has none."""
        raw = await self.connection.hget(keys.job(job_id), "record")
        if raw is not None and _record(job_id, raw).trajectory is None:
            raise UnknownPicture("the job has no trajectories; request them with `trajectory`")
        return await self._png(job_id, keys.trajectory_field(index), f"the trajectory of picture {index}", index)

    async def grid(self, job_id: str) -> bytes:
        """Return the grid's PNG. NotReady until the job is finished; UnknownJob, ExpiredJob."""
        grid = await self._png(job_id, keys.GRID, "the grid", 0)
        return await self.image(job_id, int(grid)) if grid.isdigit() else grid

    async def _png(self, job_id: str, name: str, what: str, index: int) -> bytes:
        png: Any = await self.connection.hget(keys.png(job_id), name)
        if isinstance(png, bytes):
            return png
        status, total = await self.connection.hmget(keys.job(job_id), ["status", "total"])
        if status is None or total is None:
            raise await self._gone(job_id)
        if index >= int(total):
            raise UnknownPicture(f"the job has the pictures 0 to {int(total) - 1}, not {index}")
        raise NotReady(f"{what} is not ready; the job is {text(status)}", job_status=text(status))

    async def workers(self) -> list[dict[str, Any]]:
        """Return what the live workers say about themselves, without those that are shutting down or hang."""
        live = await workers.list_live_async(self.connection)
        return [about for about in live if not (about.get("draining") or about.get("stalled"))]

    async def open_pictures(self, digest: str) -> int:
        """Return how many pictures of a checkpoint are pending or in progress."""
        pending = await self.pending_by_owner(digest)
        return sum(pending.values()) + int(await self.connection.xlen(keys.stream(digest)))

    async def pending_by_owner(self, digest: str) -> dict[str, int]:
        """Return how many pictures of a checkpoint are pending, by owner."""
        found = await self.connection.hgetall(keys.pending_counts(digest))
        return {text(owner): int(count) for owner, count in found.items()}

    async def longest_wait_s(self, digest: str) -> float:
        """Return the age of the oldest job that is next for its owner; 0 if none is pending."""
        owners: Any = await self.connection.zrange(keys.owners(digest), 0, -1)
        firsts = [await self.connection.lindex(keys.owner_jobs(digest, text(owner)), 0) for owner in owners]
        asked = [await self.connection.hget(keys.job(text(job_id)), "asked_at") for job_id in firsts if job_id]
        return max([0.0, *(time.time() - float(at) for at in asked if at)])


def _record(job_id: str, raw: bytes | str) -> JobRecord:
    """Parse a job's record. Unavailable if another version of the service wrote it and this one cannot read it."""
    try:
        return JobRecord.read(raw)
    except ValueError as error:
        log.warning("job record cannot be read", job_id=job_id, reason=str(error))
        detail = f"job {job_id!r} was created by a newer version of the service than this process; try again"
        raise Unavailable(detail, headers={"Retry-After": "2"}) from error


def _head(record: JobRecord, fields: Mapping[bytes, bytes], done: int) -> dict[str, Any]:
    """Return the fields of a JobHead, from a job's record, its hash and the number of its finished pictures."""
    state = {name.decode(): value.decode() for name, value in fields.items()}
    return {
        "id": record.id,
        "kind": record.kind,
        "status": state["status"],
        "created_at": _iso(record.created_at),
        "started_at": _iso(float(state["started_at"])) if "started_at" in state else None,
        "finished_at": _iso(float(state["finished_at"])) if "finished_at" in state else None,
        "model": record.model,
        "digest": record.digest,
        "seed": None if record.sent else record.seed,
        "options": None if record.sent else record.options,
        "progress": Progress(done=done, total=record.total),
        "error": state.get("error"),
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _picture(record: JobRecord, verdict: Verdict) -> PictureResult:
    return PictureResult(
        labels=list(verdict.labels),
        seed=None if record.sent else verdict.seed,
        accuracy=verdict.accuracy,
        exact=verdict.exact,
        f1=verdict.f1,
        scores=shown_scores(verdict, SCORE_DIGITS),
        distances=shown_distances(verdict, SCORE_DIGITS),
        url=f"/jobs/{record.id}/images/{verdict.index}.png",
        trajectory_url=f"/jobs/{record.id}/trajectories/{verdict.index}.png" if record.trajectory else None,
    )


def _summary(values: Sequence[float]) -> Summary:
    return Summary(max=max(values), mean=statistics.fmean(values), std=statistics.pstdev(values))


def _result(record: JobRecord, result: JobResult, verdicts: Sequence[Verdict]) -> GenerateResult | ScoreResult:
    """Build the result that clients see; `verdicts`: those of its best repeat."""
    shown = [_picture(record, verdict) for verdict in verdicts]
    grid_url = f"/jobs/{record.id}/grid.png"
    if record.kind == "generate":
        return GenerateResult(**result.repeats[0].model_dump(), grid_url=grid_url, pictures=shown)
    return ScoreResult(
        repeats=[
            Repeat(seed=None if record.sent else record.seed + r, **scores.model_dump())
            for r, scores in enumerate(result.repeats)
        ],
        accuracy=_summary([scores.accuracy for scores in result.repeats]),
        exact_match=_summary([scores.exact_match for scores in result.repeats]),
        f1=_summary([scores.f1 for scores in result.repeats]),
        best=result.best,
        grid_url=grid_url,
        pictures=shown,
    )
