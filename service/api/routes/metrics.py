"""GET /metrics: the API's own metrics, and the queue as Redis has it now."""

import contextlib
from dataclasses import dataclass

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from service.api.catalog import Models
from service.api.dependencies import NEEDS_KEY, ModelsDep, ReaderDep
from service.contract.errors import NoModel
from service.store.keys import OPEN, stream_key
from service.store.reader import JobReader
from service.telemetry import metrics
from shared.checkpoint import CheckpointInfo

router = APIRouter(tags=["service"])


@dataclass(frozen=True)
class Backlog:
    """The pictures of one model: those that wait, those in work, and how long the next one has waited, in s."""

    waiting: int
    in_work: int
    oldest_s: float


@router.get(
    "/metrics",
    dependencies=[NEEDS_KEY],
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"example": "labelgrid_workers 2.0\n"}}}},
    summary="Metrics for Prometheus",
)
async def read_metrics(models: ModelsDep, reader: ReaderDep) -> PlainTextResponse:
    """Workers serve theirs on ports of their own."""
    infos = await run_in_threadpool(_models_with_pictures, models)
    try:
        backlogs = {info.name: await backlog(reader, info.digest) for info in infos}
        workers, open_jobs = len(await reader.workers()), int(await reader.connection.scard(OPEN))
    except RedisError:
        metrics.REDIS_UP.set(0)
    else:
        # No await from here to the answer: a scrape at the same time would see half of it.
        metrics.REDIS_UP.set(1)
        metrics.WORKERS.set(workers)
        metrics.OPEN_JOBS.set(open_jobs)
        metrics.OPEN_PICTURES.set(sum(one.waiting + one.in_work for one in backlogs.values()))
        metrics.WAITING.clear()
        metrics.OLDEST_WAIT.clear()
        for name, one in backlogs.items():
            metrics.WAITING.labels(name).set(one.waiting)
            metrics.OLDEST_WAIT.labels(name).set(one.oldest_s)
    return PlainTextResponse(generate_latest(metrics.API), media_type=CONTENT_TYPE_LATEST)


def _models_with_pictures(models: Models) -> list[CheckpointInfo]:
    """The denoisers, whose pictures are made, and the evaluator, whose pictures are sent."""
    with contextlib.suppress(NoModel):
        return [*models.listing().denoisers, models.evaluator()]
    return models.listing().denoisers


async def backlog(reader: JobReader, digest: str) -> Backlog:
    """The pictures of a checkpoint that wait for their turn, and those that workers have taken up."""
    waiting = sum((await reader.pending_by_owner(digest)).values())
    dealt = int(await reader.connection.xlen(stream_key(digest)))
    return Backlog(waiting, dealt, await reader.longest_wait_s(digest))
