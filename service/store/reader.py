"""Jobs as clients see them, read from Redis without blocking, and waiting for their end.

Knows the schemas and `jobs.py`'s keys; writes nothing.
"""

import asyncio
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import MaxConnectionsError

from service.contract.errors import ExpiredJob, NotReady, ServiceError, UnknownJob, UnknownPicture
from service.contract.recipe import shown_scores
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
from service.store.connection import entries_of, text
from service.store.job_index import id_of
from service.store.jobs import read_verdicts
from service.store.keys import (
    GRID,
    WORKERS,
    events_key,
    index_key,
    job_key,
    owner_jobs_key,
    owners_key,
    pending_counts_key,
    png_key,
    stream_key,
    tombstone_key,
    trajectory_field,
    verdicts_key,
    worker_key,
)
from shared.options import LIMITS

SCORE_DIGITS = 6
HEAD = ["record", "status", "started_at", "finished_at", "error"]  # what a job's hash has for a list
LOOK_AGAIN_MS = 2000  # a waiter reads the state at least this often, whatever events it missed


class JobReader:
    """What can be read of jobs, their pictures and the workers."""

    def __init__(self, connection: Redis, for_waiting: Redis | None = None) -> None:
        """`for_waiting`: the connections of those who wait, who must not take away the others'."""
        self.connection, self.for_waiting = connection, for_waiting or connection
        self.stopping = False  # the server shuts down
        self.shutdown_deadline = math.inf  # when, in monotonic seconds, those who wait are to have their answer

    def stop(self, within_s: float) -> None:
        """The server shuts down: streams that can be resumed end, and nobody waits for longer than this."""
        self.stopping, self.shutdown_deadline = True, time.monotonic() + within_s

    @property
    def deadline_passed(self) -> bool:
        return time.monotonic() >= self.shutdown_deadline

    async def job(self, job_id: str, *, small: bool = False) -> Job:
        """The job as it stands. UnknownJob, ExpiredJob if it is not there.

        Of a `small` one all verdicts are read in the same go; of a large one, which may have those of a hundred
        repeats, the best repeat's are fetched after that.
        """
        async with self.connection.pipeline(transaction=False) as pipe:  # a full Redis takes no MULTI
            pipe.hgetall(job_key(job_id))
            pipe.hlen(verdicts_key(job_id))
            if small:
                pipe.hgetall(verdicts_key(job_id))
            fields, done, *verdicts = await pipe.execute()
        if not fields:
            raise await self._gone(job_id)
        state = {name.decode(): value.decode() for name, value in fields.items()}
        record = JobRecord.model_validate_json(state["record"])
        result = None
        if "result" in state:
            scores = JobResult.model_validate_json(state["result"])
            n = len(record.labels)
            shown = [str(scores.best * n + i) for i in range(n)]
            if verdicts:
                found = [verdicts[0].get(index.encode()) for index in shown]
            else:
                found = await self.connection.hmget(verdicts_key(job_id), shown)
            result = _result(record, scores, read_verdicts(one for one in found if one is not None))
        asked = {name: getattr(record, name) for name in ("labels", "layouts", "first", "trajectory", "columns")}
        return Job(**_head(state, done), **asked, result=result)

    async def _gone(self, job_id: str) -> ServiceError:
        """Why there is nothing of a job."""
        if await self.connection.exists(tombstone_key(job_id)):
            return ExpiredJob(f"the results of job {job_id!r} are over: they are kept for a limited time")
        return UnknownJob(f"there is no job {job_id!r}")

    async def check_owner(self, job_id: str, owner: str) -> None:
        """UnknownJob for a job of somebody else, as for one that never was."""
        whose = await self.connection.get(tombstone_key(job_id))
        if whose is None or text(whose) != owner:
            raise UnknownJob(f"there is no job {job_id!r}")

    async def page(self, owner: str, limit: int, cursor: str | None) -> JobPage:
        """Up to `limit` jobs of an owner, newest first, after those that a page with `next` = `cursor` ended with."""
        last = f"({cursor}" if cursor else "+"
        found: Any = await self.connection.zrevrangebylex(index_key(owner), last, "-", start=0, num=limit + 1)
        members = [text(raw) for raw in found]
        async with self.connection.pipeline(transaction=False) as pipe:
            for member in members[:limit]:
                pipe.hmget(job_key(id_of(member)), HEAD)
                pipe.hlen(verdicts_key(id_of(member)))
            answers = await pipe.execute()
        heads = []
        for values, done in zip(answers[::2], answers[1::2], strict=True):
            state = {name: text(value) for name, value in zip(HEAD, values, strict=True) if value is not None}
            if state:  # else its results are over
                heads.append(JobHead(**_head(state, done)))
        return JobPage(jobs=heads, next=members[limit - 1] if len(members) > limit else None)

    async def wait(self, job_id: str, timeout_s: float) -> Job:
        """The job once it has ended, or as it stands after `timeout_s` or when a shutdown wants an answer.

        Events only wake; the state decides. Those that end no job, such as one for every picture, are passed over.
        """
        deadline = time.monotonic() + timeout_s
        seen, look, small = "0-0", True, False
        status: str | None = "running"
        while True:
            if look:
                found = await self.connection.hmget(job_key(job_id), ["status", "total"])
                status, total = (None if one is None else text(one) for one in found)
                small = total is not None and int(total) <= LIMITS.max_pictures_per_request
            left_ms = int((min(deadline, self.shutdown_deadline) - time.monotonic()) * 1000)
            if status is None or status in TERMINAL or left_ms <= 0:
                return await self.job(job_id, small=small)
            entries = entries_of(await self.read_streams({events_key(job_id): seen}, min(left_ms, LOOK_AGAIN_MS)))
            if entries:
                seen = text(entries[-1][0])
            look = not entries or any(text(fields.get(b"status", b"")) in TERMINAL for _, fields in entries)

    async def read_streams(self, seen: dict[Any, Any], within_ms: int) -> Any:
        """What streams, key -> last entry seen, get within a time; as XREAD has it.

        Where more wait than there are connections for it, the others look at the end of that time only.
        """
        try:
            return await self.for_waiting.xread(seen, block=within_ms)
        except MaxConnectionsError:
            await asyncio.sleep(within_ms / 1000)
            return await self.connection.xread(seen)

    async def status(self, job_id: str) -> str | None:
        status = await self.connection.hget(job_key(job_id), "status")
        return None if status is None else text(status)

    async def image(self, job_id: str, index: int) -> bytes:
        """A picture's PNG. NotReady while it is not made; UnknownJob, ExpiredJob, UnknownPicture."""
        return await self._png(job_id, str(index), f"picture {index}", index)

    async def trajectory(self, job_id: str, index: int) -> bytes:
        """A picture's strip as PNG. NotReady while it is not made; UnknownJob, ExpiredJob, UnknownPicture."""
        raw = await self.connection.hget(job_key(job_id), "record")
        if raw is not None and JobRecord.model_validate_json(raw).trajectory is None:
            raise UnknownPicture("the job was not asked for with a trajectory")
        return await self._png(job_id, trajectory_field(index), f"the trajectory of picture {index}", index)

    async def grid(self, job_id: str) -> bytes:
        """The grid's PNG. NotReady while the job is not finished; UnknownJob, ExpiredJob."""
        grid = await self._png(job_id, GRID, "the grid", 0)
        return await self.image(job_id, int(grid)) if grid.isdigit() else grid

    async def _png(self, job_id: str, name: str, what: str, index: int) -> bytes:
        png: Any = await self.connection.hget(png_key(job_id), name)
        if isinstance(png, bytes):
            return png
        status, total = await self.connection.hmget(job_key(job_id), ["status", "total"])
        if status is None or total is None:
            raise await self._gone(job_id)
        if index >= int(total):
            raise UnknownPicture(f"the job has the pictures 0 to {int(total) - 1}, not {index}")
        raise NotReady(f"{what} is not made; the job is {text(status)}", job_status=text(status))

    async def workers(self) -> list[dict[str, Any]]:
        """What the live workers, each with a model loaded, say of themselves; not those about to end."""
        names = await self.connection.smembers(WORKERS)
        found = await self.connection.mget([worker_key(text(name)) for name in names]) if names else []
        workers = [json.loads(raw) for raw in found if raw is not None]
        return [about for about in workers if not about.get("draining")]

    async def open_pictures(self, digest: str) -> int:
        """How many pictures of a checkpoint wait or are in work."""
        return sum((await self.pending_by_owner(digest)).values()) + int(await self.connection.xlen(stream_key(digest)))

    async def pending_by_owner(self, digest: str) -> dict[str, int]:
        """How many pictures of a checkpoint wait, by owner."""
        found = await self.connection.hgetall(pending_counts_key(digest))
        return {text(owner): int(count) for owner, count in found.items()}

    async def longest_wait_s(self, digest: str) -> float:
        """How long those have waited who are first among their owners' jobs: the longest of them; 0 if none waits."""
        owners: Any = await self.connection.zrange(owners_key(digest), 0, -1)
        firsts = [await self.connection.lindex(owner_jobs_key(digest, text(owner)), 0) for owner in owners]
        asked = [await self.connection.hget(job_key(text(job_id)), "asked_at") for job_id in firsts if job_id]
        return max([0.0, *(time.time() - float(at) for at in asked if at)])


def _head(state: Mapping[str, str], done: int) -> dict[str, Any]:
    """The fields of a JobHead, of a job's hash and the number of its finished pictures."""
    record = JobRecord.model_validate_json(state["record"])
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
        url=f"/jobs/{record.id}/images/{verdict.index}.png",
        trajectory_url=f"/jobs/{record.id}/trajectories/{verdict.index}.png" if record.trajectory else None,
    )


def _summary(values: Sequence[float]) -> Summary:
    return Summary(max=max(values), mean=statistics.fmean(values), std=statistics.pstdev(values))


def _result(record: JobRecord, result: JobResult, verdicts: Sequence[Verdict]) -> GenerateResult | ScoreResult:
    """The result as shown, `verdicts` being those of its best repeat."""
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
