"""Streams of /v1 read with OpenAI's own client: partial images, the pictures, and errors after the stream has begun."""

import base64
import io
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from redis import Redis

from service.store import keys
from service.store.connection import text
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.service.openai.test_routes import PROMPT, openai_client
from tests.service.processes import until

PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"


@pytest.fixture
def ai(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai_client(client) as ai:
        yield ai


def png_of(event: Any) -> bytes:
    return base64.b64decode(event.b64_json)


def test_a_stream_ends_with_the_pictures_of_generate(ai: openai.OpenAI, client: httpx.Client, working: Runner) -> None:
    with ai.images.generate(prompt=PROMPT, n=2, stream=True, extra_body={"seed": 7, "steps": 3}) as stream:
        events: list[Any] = list(stream)
    assert [event.type for event in events] == [COMPLETED] * 2
    job = client.post("/generate", json={"labels": [["red cube", "blue sphere"]] * 2, "seed": 7, "steps": 3}).json()
    for event in events:
        assert (event.size, event.revised_prompt, event.seed) == ("16x16", "red cube, blue sphere", 7)
        assert png_of(event) == client.get(job["result"]["pictures"][event.index]["url"]).content
    assert {event.index for event in events} == {0, 1}
    assert client.get(events[0].job).json()["result"] is not None


def watched_job(connection: Redis) -> str:
    """Return the only open job, once somebody watches it."""

    def found() -> str | None:
        ids: Any = connection.zrange(keys.OPEN, 0, -1)
        return text(ids[0]) if ids and connection.exists(keys.watched(text(ids[0]))) else None

    return until(found, timeout_s=60)


def previewed(connection: Redis, steps: list[int], of: int) -> None:
    """Publish previews of the only open job, as a worker does."""
    job_id = watched_job(connection)
    for step in steps:
        small = io.BytesIO()
        Image.new("RGB", (8, 8), (step, 0, 0)).save(small, "PNG")
        preview = "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()
        one = {"index": 0, "step": step, "steps": of, "preview": preview}
        connection.publish(keys.PREVIEWS, f"{job_id} {json.dumps([one])}")
        time.sleep(0.1)


def test_partial_images_divide_the_steps_and_have_the_size_of_the_picture(
    ai: openai.OpenAI, alive: JobStore, connection: Redis
) -> None:
    """Nine previews of twelve steps, three images: from 3, 6 and 9 steps on. The job is then cancelled."""
    worker = threading.Thread(target=previewed, args=(connection, [1, 2, 4, 5, 7, 8, 10, 11, 12], 12))
    worker.start()
    events = list[Any]()
    with ai.images.generate(prompt=PROMPT, size="64x48", stream=True, partial_images=3) as stream:
        events += itertools.islice(stream, 3)
        worker.join()
        alive.cancel(watched_job(connection))
        with pytest.raises(openai.APIError, match="the job was cancelled while you waited for it") as caught:
            next(stream)
    assert caught.value.code == "job_cancelled"
    assert [(event.type, event.partial_image_index, event.index) for event in events] == [
        (PARTIAL, 0, 0), (PARTIAL, 1, 0), (PARTIAL, 2, 0)
    ]  # fmt: skip
    shown = [Image.open(io.BytesIO(png_of(event))) for event in events]
    assert [picture.size for picture in shown] == [(48, 48)] * 3
    assert [picture.getpixel((0, 0)) for picture in shown] == [(4, 0, 0), (7, 0, 0), (10, 0, 0)]


def test_the_same_request_again_streams_the_pictures_of_its_job(
    ai: openai.OpenAI, client: httpx.Client, working: Runner
) -> None:
    """Its job has ended, so nothing but the pictures is left."""
    seen = []
    for _ in range(2):
        key = {"Idempotency-Key": "once"}
        with ai.images.generate(
            prompt=PROMPT, n=2, stream=True, partial_images=3, extra_body={"steps": 1}, extra_headers=key
        ) as stream:
            events: list[Any] = list(stream)
        seen.append(sorted((event.index, event.b64_json) for event in events if event.type == COMPLETED))
    assert seen[0] == seen[1]
    assert [index for index, _ in seen[0]] == [0, 1]
    assert len(client.get("/jobs").json()["jobs"]) == 1
