"""The least that an API for this service does, whose CPU time `sections/service.py` measures beside ours.

FastAPI reads and validates the same body, writes it to Redis, waits as long as the service takes, reads it back, and
answers. No job, no worker.
"""

import argparse
import asyncio
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from redis.asyncio import Redis


class Request(BaseModel):
    """The fields that `sections/service.py` sends."""

    labels: list[list[str]]
    seed: int
    model: str | None = None


def make_app(redis: Redis, wait_s: float) -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/generate")
    async def generate(request: Request) -> dict[str, Any]:
        key = f"least:{uuid4().hex}"
        await redis.set(key, request.model_dump_json(), ex=600)
        await asyncio.sleep(wait_s)
        return {"status": "finished", "request": await redis.get(key)}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("redis_url")
    parser.add_argument("wait_s", type=float)
    asked = parser.parse_args()
    app = make_app(Redis.from_url(asked.redis_url), asked.wait_s)
    uvicorn.run(app, port=asked.port, log_level="warning", access_log=False)
