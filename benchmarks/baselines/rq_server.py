"""FastAPI with one RQ job a request: `python -m benchmarks.baselines.rq_server api|worker engine|diffusers`.

The worker draws one job after the other. Redis is the one of LABELGRID_REDIS_URL. Like `litserve_server.py`, it answers
`POST /generate` with {"labels", "seed", "steps", "guidance"} by the grid as PNG.
"""

import argparse
import asyncio
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from redis import Redis
from rq import Queue, SimpleWorker

from benchmarks.baselines.drawing import DRAWINGS, Drawing, Request

JOB = "benchmarks.baselines.rq_server.draw"  # by name, since this module runs as `__main__`
WAIT_S = 0.01  # of the API, before it asks for the job again


@cache
def drawing(kind: str) -> Drawing:
    """Return this process's drawing; loads the checkpoints at the first call."""
    return DRAWINGS[kind]()


def draw(kind: str, body: dict[str, Any]) -> bytes:
    """Draw one request: the RQ job."""
    return drawing(kind)([Request.model_validate(body)])[0]


def serve(kind: str, port: int) -> None:
    """Run the API."""
    app, queue = FastAPI(), Queue(kind, connection=redis())

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        job = await asyncio.to_thread(queue.enqueue, JOB, kind, request.model_dump())
        while await asyncio.to_thread(job.get_status, refresh=True) not in ("finished", "failed"):
            await asyncio.sleep(WAIT_S)
        return Response(await asyncio.to_thread(job.return_value), media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def work(kind: str, _: int) -> None:
    """Run the worker."""
    import_module(JOB.rpartition(".")[0]).drawing(kind)  # before the first job, as LitServe's worker loads it
    SimpleWorker([kind], connection=redis()).work(logging_level="ERROR")


def redis() -> Redis:
    # without its limit of five seconds, which Redis may take to answer on a busy machine: the API would answer 500
    return Redis.from_url(os.environ["LABELGRID_REDIS_URL"], socket_timeout=None)


ROLES: dict[str, Callable[[str, int], None]] = {"api": serve, "worker": work}


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.baselines.rq_server", description=__doc__)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("drawing", choices=DRAWINGS)
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    ROLES[asked.role](asked.drawing, asked.port)
