"""HEAD is answered as GET, without the body."""

import asyncio

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from service.api.access.guard import Guard
from service.api.access.keys import KeyRing
from service.settings import Settings
from service.store.jobs import JobStore
from tests.service.store.helpers import add_job, record


@pytest.mark.parametrize(
    "path",
    ["/", "/healthz", "/readyz", "/labels", "/models", "/metrics", "/jobs", "/openapi.json", "/static/app.js", "/no"],
)
def test_an_answer_to_head_has_the_headers_of_get_and_no_body(client: httpx.Client, alive: JobStore, path: str) -> None:
    expected = client.get(path)
    found = httpx.head(client.base_url.join(path))  # not by `client`: the document does not describe HEAD
    assert (found.status_code, found.content) == (expected.status_code, b"")
    assert found.headers["content-type"] == expected.headers["content-type"]
    if path != "/metrics":  # whose length changes
        assert found.headers["content-length"] == expected.headers["content-length"]


def test_head_of_a_stream_ends_with_its_headers(client: httpx.Client, alive: JobStore) -> None:
    job = record(1)
    add_job(alive, job)
    found = httpx.head(client.base_url.join(f"/jobs/{job.id}/events"), timeout=10)
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-type"].startswith("text/event-stream")


def test_the_body_ends_once_however_many_parts_get_has() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["method"] == "GET"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"one", b"two", b""):
            await send({"type": "http.response.body", "body": part, "more_body": bool(part)})

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    sent = list[Message]()
    guard = Guard(app, KeyRing("", None), Settings(), [])
    asyncio.run(guard({"type": "http", "method": "HEAD", "path": "/", "headers": []}, receive, send))
    assert sent[1:] == [{"type": "http.response.body"}]
