"""Redis's clock dates jobs and their files: those of API, webhooks and commands may be wrong."""

import asyncio
import time

import httpx
import pytest
from redis import Redis

from service.contract.job_ids import created_at
from service.pictures import PictureFiles
from service.settings import Settings
from service.store import pipeline
from service.store.connection import connect_async
from service.store.jobs import JobStore
from service.store.pipeline import Pipeline
from tests.service.api.answers import problem, submitted

WRONG_S = 40 * 24 * 3600


@pytest.mark.parametrize("wrong_s", [-WRONG_S, WRONG_S])
def test_an_api_whose_clock_is_40_days_off_loses_no_job_and_no_picture(
    client: httpx.Client, alive: JobStore, settings: Settings, monkeypatch: pytest.MonkeyPatch, wrong_s: int
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + wrong_s)
    created = submitted(client)
    alive.cancel(created)
    retried = client.post(f"/jobs/{created}/retry", headers={"prefer": "respond-async"}).json()["id"]
    now = alive.connection.time()[0]
    files = PictureFiles(settings.pictures)
    for job_id in (created, retried):
        assert abs(created_at(job_id) - now) < 60
        files.write(job_id, "0.png", b"")
    files.remove_older(now - settings.keep_s)
    for job_id in (created, retried):
        assert files.read(job_id, "0.png") == b""
        alive.cancel(job_id)
        alive.delete(job_id)
        problem(client.get(f"/jobs/{job_id}"), 404, "unknown-job")  # not 410, which only age explains


def test_redis_is_asked_now_and_then(connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """In between, the monotonic clock counts on."""
    asked, monotonic = list[float](), time.monotonic

    async def answer(_: object, command: str) -> tuple[int, int]:
        asked.append(passed)
        return 1_000_000 + int(passed), 500_000

    async def read() -> list[float]:
        nonlocal passed
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=1) as client:
            monkeypatch.setattr(Pipeline, "__call__", answer)
            redis_clock, found = Pipeline(client), []
            for passed in (0.0, 4.0, pipeline.CLOCK_EVERY_S + 1):
                found.append(await redis_clock.now() - passed)
            return found

    passed, began = 0.0, monotonic()
    monkeypatch.setattr(pipeline, "time", type("", (), {"monotonic": staticmethod(lambda: began + passed)}))
    assert asyncio.run(read()) == pytest.approx([1_000_000.5] * 3)
    assert asked == [0.0, pipeline.CLOCK_EVERY_S + 1]
