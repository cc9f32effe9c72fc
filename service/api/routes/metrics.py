"""GET /metrics: the API's own metrics, and the state of the queue in Redis."""

import contextlib

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from service.api.catalog import Models
from service.api.dependencies import NEEDS_KEY, ModelsDep, ReaderDep
from service.contract.errors import NoModel
from service.store import keys
from service.telemetry import metrics
from shared.checkpoint import CheckpointInfo

router = APIRouter(tags=["service"])


@router.get(
    "/metrics",
    dependencies=[NEEDS_KEY],
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"example": "labelgrid_workers 2.0\n"}}}},
    summary="Metrics for Prometheus",
)
async def read_metrics(models: ModelsDep, reader: ReaderDep) -> PlainTextResponse:
    """The API's metrics and the state of the queue. Each worker serves its own metrics on a port of its own."""
    infos = await run_in_threadpool(_sampled_and_judged, models)
    try:
        pending = {info.name: sum((await reader.pending_by_owner(info.digest)).values()) for info in infos}
        claimed = [int(await reader.connection.xlen(keys.stream(info.digest))) for info in infos]
        oldest_s = {info.name: await reader.longest_wait_s(info.digest) for info in infos}
        workers, open_jobs = len(await reader.workers()), int(await reader.connection.scard(keys.OPEN))
    except RedisError:
        metrics.REDIS_UP.set(0)
    else:
        # No await from here to the answer: a simultaneous scrape would see half of it.
        metrics.REDIS_UP.set(1)
        metrics.WORKERS.set(workers)
        metrics.OPEN_JOBS.set(open_jobs)
        metrics.OPEN_PICTURES.set(sum(pending.values()) + sum(claimed))
        metrics.WAITING.clear()
        metrics.OLDEST_WAIT.clear()
        for name in pending:
            metrics.WAITING.labels(name).set(pending[name])
            metrics.OLDEST_WAIT.labels(name).set(oldest_s[name])
    return PlainTextResponse(generate_latest(metrics.API), media_type=CONTENT_TYPE_LATEST)


def _sampled_and_judged(models: Models) -> list[CheckpointInfo]:
    """Return the checkpoints that pictures are queued for: the denoisers, and the evaluator for uploaded pictures."""
    denoisers = models.listing().denoisers
    with contextlib.suppress(NoModel):
        return [*denoisers, models.find(None, kind="evaluator")]
    return denoisers
