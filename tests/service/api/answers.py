"""What tests of the API send, and how they read the answers."""

import io
import json
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image, PngImagePlugin
from redis import Redis

from service.store import keys

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
JSON = {"content-type": "application/json"}
Body = dict[str, Any]
JOB_EXAMPLE: Body = {
    "id": "5f0c9e1a7d3b7c2e8a6f1b0d9c8e7f6a",
    "kind": "generate",
    "status": "finished",
    "created_at": "2026-01-01T12:00:00.000+00:00",
    "started_at": "2026-01-01T12:00:00.125+00:00",
    "finished_at": "2026-01-01T12:00:01.250+00:00",
    "model": "base",
    "digest": "9f2c" * 16,
    "seed": 7,
    "options": {},
    "progress": {"done": 1, "total": 1},
    "error": None,
    "labels": [["gray cylinder"]],
    "result": {
        "accuracy": 1.0,
        "exact_match": 1.0,
        "f1": 1.0,
        "grid_url": "/jobs/5f0c9e1a7d3b7c2e8a6f1b0d9c8e7f6a/grid.png",
        "pictures": [
            {
                "labels": ["gray cylinder"],
                "seed": 4203129384,
                "accuracy": 1.0,
                "exact": True,
                "f1": 1.0,
                "scores": {"gray cylinder": 0.99, "gray cube": 0.01},
                "url": "/jobs/5f0c9e1a7d3b7c2e8a6f1b0d9c8e7f6a/images/0.png",
            }
        ],
    },
}


def problem(response: httpx.Response, status: int, slug: str) -> Body:
    """Return the body of an answer after checking that it is this problem."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: Body = response.json()
    assert body["type"] == f"urn:labelgrid:problem:{slug}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body


def nothing_is_queued(connection: Redis) -> bool:
    """Return whether Redis holds nothing but a worker."""
    of_workers = {keys.OLD_WORKERS, keys.old_worker("w"), "rq:queues", *connection.keys("rq:worker*")}
    return set(connection.keys("*")) <= of_workers


def scoring(lists: Sequence[Sequence[str]], **fields: Any) -> dict[str, Any]:
    """Return httpx's arguments of a `POST /score`."""
    return {"files": {"file": ("test.json", json.dumps(lists))}, "data": fields}


def submitted(client: httpx.Client, **fields: Any) -> str:
    """Return the id of a new job."""
    response = client.post("/generate", json={"labels": LISTS, **fields}, headers={"prefer": "respond-async"})
    assert response.status_code == 202, response.text
    job_id: str = response.json()["id"]
    return job_id


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int16)


def image(client: httpx.Client, job: dict[str, Any], index: int = 0) -> bytes:
    """Return the PNG of a job's picture."""
    return client.get(f"/jobs/{job['id']}/images/{index}.png").raise_for_status().content


def recipe_in(png: bytes) -> dict[str, Any]:
    """Return the recipe in a PNG, read as any other program would."""
    with Image.open(io.BytesIO(png)) as picture:
        content: dict[str, Any] = json.loads(picture.info["labelgrid"])
    return content


def png_with(text: str | None, size: tuple[int, int] = (4, 4)) -> bytes:
    """Return an empty picture with this text as its recipe."""
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt("labelgrid", text)
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
