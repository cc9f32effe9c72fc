"""What one client may hold: a part of an answer that it does not read, and some of the threads that read storage."""

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from service.api.results import PART, ResultReader, Slots
from service.files import GRID, PictureFiles, trajectory_name
from service.settings import Settings
from service.store.async_jobs import AsyncJobs
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared import storage
from tests.conftest import application
from tests.service.api.answers import JSON
from tests.service.api.routes.test_jobs import finished

LARGE = 5 * PART + 1  # bytes of a file


async def begun(
    settings: Settings, request: str, enough: Callable[[list[bytes]], object], body: Any = None, **headers: str
) -> list[bytes]:
    """Return the parts of an answer that the API sends to a client that reads no more once they are `enough`."""
    sent, waiting, blocked = list[bytes](), asyncio.Event(), asyncio.Event()
    received = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

    async def receive() -> Any:
        return next(received, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
            return
        sent.append(message["body"])
        if enough(sent):
            blocked.set()
            await waiting.wait()

    (method, path), app = request.split(), application(settings)
    given = [(name.encode(), value.encode()) for name, value in {"host": "localhost", **JSON, **headers}.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": given, "query_string": b""}
    async with app.router.lifespan_context(app):
        answer = asyncio.create_task(app(scope, receive, send))
        await asyncio.wait([answer, asyncio.create_task(blocked.wait())], return_when=asyncio.FIRST_COMPLETED)
        assert not answer.done(), "it has not waited for the client"
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
    return sent


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """The parts that are read of files, as they come."""
    read, seen = storage.read, list[tuple[int, int | None]]()

    def noted(path: Path, start: int = 0, end: int | None = None) -> bytes:
        seen.append((start, end))
        return read(path, start, end)

    monkeypatch.setattr(storage, "read", noted)
    return seen


@pytest.mark.parametrize("path", ["grid.png", "trajectories/1.png"])
def test_of_a_file_that_is_not_read_two_parts_are_in_memory(
    settings: Settings, alive: JobStore, path: str, reads: list[tuple[int, int | None]]
) -> None:
    job_id, _ = finished(alive, 2, trajectory=2)
    for name in (GRID, trajectory_name(1)):
        PictureFiles(settings.pictures).write(job_id, name, bytes(LARGE))
    sent = asyncio.run(begun(settings, f"GET /jobs/{job_id}/{path}", lambda sent: len(sent) == 2))
    assert (reads, [len(part) for part in sent]) == ([(0, PART), (PART, 2 * PART)], [PART, PART])


def test_of_the_pictures_of_v1_that_are_not_read_one_is_in_memory(
    settings: Settings, working: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, seen = ResultReader.image, list[int]()

    async def noted(reader: ResultReader, job_id: str, owner: str, index: int) -> bytes:
        seen.append(index)
        return await image(reader, job_id, owner, index)

    monkeypatch.setattr(ResultReader, "image", noted)
    body = {"prompt": "red cube", "steps": 1, "n": 3}
    asyncio.run(begun(settings, "POST /v1/images/generations", lambda sent: b"b64_json" in sent[-1], body))
    assert set(seen) == {0}


def test_an_owner_takes_one_slot_however_much_they_send() -> None:
    async def run() -> list[str]:
        slots, order, go = Slots(2), list[str](), asyncio.Event()

        async def work(owner: str) -> None:
            async with slots.of(owner):
                order.append(owner)
                await go.wait()

        tasks = [asyncio.create_task(work(owner)) for owner in ["alice"] * 5 + ["bob", "carol"]]
        while len(order) < 2:
            await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*tasks)
        del tasks
        gc.collect()
        assert not slots._own  # nothing stays of an owner who waits for nothing
        return order

    order = asyncio.run(run())
    assert order[:2] == ["alice", "bob"]
    assert order.index("carol") == 2


def test_an_owner_who_reads_much_from_slow_storage_leaves_threads_to_others(tmp_path: Path) -> None:
    answers = threading.Event()

    class Slow(PictureFiles):
        def read(self, job_id: str, name: str, start: int = 0, end: int | None = None) -> bytes:
            assert job_id == "bobs" or answers.wait(60)
            return b"png"

    async def run() -> bytes:
        reader = ResultReader(cast(AsyncJobs, None), Slow(tmp_path))
        alices = [asyncio.create_task(reader.image("alices", "alice", i)) for i in range(40)]
        await asyncio.sleep(0)
        found = await reader.image("bobs", "bob", 0)
        answers.set()
        await asyncio.gather(*alices)
        return found

    assert asyncio.run(run()) == b"png"
