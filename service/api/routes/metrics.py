"""GET /metrics: the API's own metrics, and the state of the queue in Redis."""

import asyncio
from collections import Counter, defaultdict

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from service.api.dependencies import ModelsDep, ServiceDep
from service.api.openapi import problems
from service.store import keys
from service.telemetry import metrics
from service.telemetry.boundary import confined

router = APIRouter(tags=["service"])

AWAY = RedisError, TimeoutError  # what it raises while Redis is away
REDIS_WITHIN_S = 5.0  # Prometheus waits for 10 s, unless told otherwise, and would count the API as down


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=problems(),
    summary="Metrics for Prometheus",
)
async def read_metrics(models: ModelsDep, service: ServiceDep) -> PlainTextResponse:
    """The API's metrics and the state of the queue. Each worker serves its own metrics on a port of its own."""
    names, jobs = models.names, service.jobs
    metrics.ON_DEMAND.set(service.settings.accept_without_workers)
    pending, oldest_s, claimed = Counter[str](), defaultdict[str, float](float), 0
    try:
        async with asyncio.timeout(REDIS_WITHIN_S):
            workers, open_jobs = await jobs.workers(), await jobs.redis("ZCARD", keys.DEADLINES)
            loaded = {model["digest"]: model["name"] for about in workers for model in about.get("models", ())}
            for digest, name in {**loaded, **names}.items():  # storage may have replaced what workers still sample from
                with confined("model", passes=lambda error: isinstance(error, AWAY), model=name):
                    pending[name] += sum(map(int, await jobs.redis("HVALS", keys.waiting(digest))))
                    oldest_s[name] = max(oldest_s[name], await jobs.longest_wait_s(digest))
                    claimed += await jobs.redis("XLEN", keys.pictures(digest))
    except AWAY:
        metrics.REDIS_UP.set(0)
    else:
        # No await from here to the answer: a simultaneous scrape would see half of it.
        metrics.REDIS_UP.set(1)
        metrics.WORKERS.set(len(workers))
        metrics.OPEN_JOBS.set(open_jobs)
        metrics.OPEN_PICTURES.set(pending.total() + claimed)
        metrics.WAITING.clear()
        metrics.OLDEST_WAIT.clear()
        for name in pending:
            metrics.WAITING.labels(name).set(pending[name])
            metrics.OLDEST_WAIT.labels(name).set(oldest_s[name])
    return PlainTextResponse(generate_latest(metrics.API), media_type=CONTENT_TYPE_LATEST)
