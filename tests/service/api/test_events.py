"""Server-sent events of a job: each arrives once and in order, however many clients there are."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from redis import Redis

from service.settings import Settings
from service.store import keys
from service.store.hub import Hub
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.service.api.answers import LISTS, submitted
from tests.service.processes import until
from tests.service.worker.conftest import run

Event = dict[str, Any]


@pytest.fixture
def runner(connection: Redis, settings: Settings, alive: JobStore, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr("service.worker.runner.LIVE_EVERY_S", 0.0)
    runner = Runner(connection, settings, "w")
    runner.models.load()
    return runner


def events(response: httpx.Response) -> Iterator[Event]:
    """Yield the events of a stream as dictionaries of event, id and data."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    event: Event = {}
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name in ("event", "id"):
            event[name] = value
        elif name == "data":
            event[name] = json.loads(value)
        elif not line and event:
            yield event
            event = {}


def read(client: httpx.Client, job_id: str, after: str | None = None) -> list[Event]:
    headers = {"last-event-id": after} if after else {}
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        return list(events(response))


def test_events_come_in_order_and_can_be_resumed_after_any_of_them(client: httpx.Client, runner: Runner) -> None:
    job_id = submitted(client, steps=2)
    run(runner, job_id)
    received = read(client, job_id)
    assert [event["event"] for event in received] == ["job", "status", "picture", "picture", "end"]
    assert received[1]["data"] == {"status": "running"}
    assert [event["data"]["index"] for event in received[2:4]] == [0, 1]
    assert client.get(received[2]["data"]["url"]).headers["content-type"] == "image/png"
    assert received[0]["data"] == received[-1]["data"] == client.get(f"/jobs/{job_id}").json()
    for i in range(1, 4):
        assert read(client, job_id, after=received[i]["id"])[1:] == received[i + 1 :]
    complete = client.get(f"/jobs/{job_id}/events", headers={"last-event-id": received[-1]["id"]})
    assert (complete.status_code, complete.content) == (204, b"")


def test_an_only_picture_comes_with_the_end_of_its_job(client: httpx.Client, runner: Runner) -> None:
    job_id = submitted(client, labels=LISTS[:1], steps=1)
    run(runner, job_id)
    received = read(client, job_id)
    assert [event["event"] for event in received] == ["job", "status", "picture", "end"]
    assert received[2]["data"] == {"index": 0, "url": f"/jobs/{job_id}/images/0.png"}
    assert "id" not in received[2]  # so that a client that misses the end does not miss it for good
    assert read(client, job_id, after=received[1]["id"])[1:] == received[2:]
    assert client.get(f"/jobs/{job_id}/events", headers={"last-event-id": received[-1]["id"]}).status_code == 204


def test_steps_and_previews_come_while_the_job_runs_until_it_is_cancelled(client: httpx.Client, runner: Runner) -> None:
    job_id = submitted(client, steps=1000)
    working = threading.Thread(target=run, args=(runner, job_id))
    with client.stream("GET", f"/jobs/{job_id}/events") as response:
        received = events(response)
        assert next(received)["event"] == "job"
        working.start()
        steps = []
        for event in received:
            if event["event"] == "steps":
                steps.append(event["data"]["pictures"])
                if len(steps) == 3:
                    client.post(f"/jobs/{job_id}/cancel")
    working.join()
    assert event["event"] == "end"
    assert event["data"]["status"] == "cancelled"
    assert all([picture["index"] for picture in pictures] == [0, 1] for pictures in steps)
    assert [pictures[0]["steps"] for pictures in steps] == [1000] * len(steps)
    positions = [pictures[0]["step"] for pictures in steps]
    assert positions == sorted(set(positions))
    head, _, body = steps[0][1]["preview"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (16, 16)


def test_the_stream_of_a_job_that_is_lost_ends(client: httpx.Client, alive: JobStore) -> None:
    job_id = submitted(client)
    with client.stream("GET", f"/jobs/{job_id}/events") as response:
        received = events(response)
        assert next(received)["event"] == "job"
        alive.connection.delete(keys.job(job_id), keys.events(job_id))
        assert list(received) == []


def test_previews_stop_soon_after_the_client_disconnects(client: httpx.Client, alive: JobStore) -> None:
    job_id = submitted(client)
    key = keys.watched(job_id)
    with client.stream("GET", f"/jobs/{job_id}/events") as response:
        assert response.headers["x-accel-buffering"] == "no"  # else a proxy would collect them
        assert ": ping" in response.iter_lines()
        until(lambda: alive.connection.exists(key))
    until(lambda: not alive.connection.exists(key))


def test_a_message_that_cannot_be_read_wakes_nobody_and_costs_no_other() -> None:
    async def hear() -> list[bool]:
        hub = Hub(None)  # type: ignore[arg-type]
        with hub.watch("a") as watch:
            for data in ("not JSON", "[1]", '{"a": true}'):
                hub._hear({"type": "message", "channel": keys.CHANGES, "data": data})
                heard.append(watch.has_ended)
        return heard

    heard: list[bool] = []
    assert asyncio.run(hear()) == [False, False, True]
