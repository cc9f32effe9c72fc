"""The least that an API for this service does, whose CPU time `sections/service.py` measures beside ours.

FastAPI reads and validates the same body, writes it to Redis, reads it back, and answers at once. No job, no wait.
"""

import argparse
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


def make_app(redis: Redis) -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> None:
        pass

    @app.post("/generate")
    async def generate(request: Request) -> dict[str, Any]:
        key = f"least:{uuid4().hex}"
        await redis.set(key, request.model_dump_json(), ex=60)
        return {"status": "finished", "request": await redis.get(key)}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("redis_url")
    asked = parser.parse_args()
    uvicorn.run(make_app(Redis.from_url(asked.redis_url)), port=asked.port, log_level="warning", access_log=False)
