"""The answer that a client prefers: at once or after a wait, as JSON or as PNG."""

import asyncio
import time
from types import SimpleNamespace
from typing import cast

import httpx
import pytest

from service.api.dependencies import Service
from service.api.submit import Preferences, read_preferences
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.service.api.answers import LISTS, problem


@pytest.mark.parametrize(
    ("prefer", "accept", "preferences"),
    [
        ("wait=7", "application/json", Preferences(7, False, "wait=7")),
        ("respond-async, wait=7", "image/png", Preferences(7, True, "wait=7")),
        ('WAIT = "3"', "image/png;q=0.1, application/json", Preferences(3, False, "wait=3")),
        ("wait=31", "*/*", Preferences(30, False, "wait=31")),
        ("Respond-Async", "Image/PNG", Preferences(0, True, "respond-async")),
        ("wait=soon, handling=strict", "image/png", Preferences(30, True, None)),
        ("", "application/json", Preferences(30, False, None)),
        ("respond-async; x=1", "", Preferences(0, False, "respond-async")),
        ("wait=0; foo", "", Preferences(0, False, "wait=0")),
        ('foo="x, respond-async, y"', "", Preferences(30, False, None)),
        ("", "image/png, */*", Preferences(30, True, None)),
        ("", "image/*", Preferences(30, False, None)),
    ],
)
def test_reading_the_headers(settings: Settings, prefer: str, accept: str, preferences: Preferences) -> None:
    service = SimpleNamespace(settings=settings.model_copy(update={"wait_s": 30}))
    assert asyncio.run(read_preferences(cast(Service, service), [prefer], [accept])) == preferences


def test_prefer_respond_async(client: httpx.Client, alive: JobStore) -> None:
    response = client.post("/generate", json={"labels": LISTS, "seed": 7}, headers={"prefer": "respond-async"})
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert (job["status"], job["progress"], job["result"]) == ("queued", {"done": 0, "total": 2}, None)
    assert client.get(response.headers["location"]).json() == job
    assert problem(client.get(f"/jobs/{job['id']}/grid.png"), 409, "not-ready")["job_status"] == "queued"
    problem(client.get(f"/jobs/{job['id']}/images/1.png"), 409, "not-ready")
    problem(client.get(f"/jobs/{job['id']}/images/2.png"), 404, "unknown-picture")
    for index in ("-1", "one"):
        problem(client.get(f"/jobs/{job['id']}/images/{index}.png"), 422, "invalid-request")


def test_prefer_wait(client: httpx.Client, alive: JobStore) -> None:
    begun = time.monotonic()
    response = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "wait=1", "accept": "image/png"})
    assert response.status_code == 202
    assert time.monotonic() - begun > 0.9  # and the setting's 300 s are more than the client would wait
    assert response.headers["preference-applied"] == "wait=1"


def test_a_header_may_have_several_lines(client: httpx.Client, working: Runner) -> None:
    body = {"labels": LISTS, "steps": 1}
    prefer = [("prefer", "foo=1"), ("prefer", "respond-async")]
    assert client.post("/generate", json=body, headers=prefer).status_code == 202
    accept = [("accept", "text/html"), ("accept", "image/png")]
    assert client.post("/generate", json=body, headers=accept).headers["content-type"] == "image/png"


def test_accept_png_answers_with_the_grid(client: httpx.Client, working: Runner) -> None:
    response = client.post("/generate", json={"labels": LISTS, "steps": 2}, headers={"accept": "image/png"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert client.get(response.headers["content-location"]).content == response.content


@pytest.mark.parametrize(
    ("accept", "png"),
    [
        ("image/png, application/json", False),
        ("image/png, */*;q=0.9", True),
        ("*/*", False),
        ("text/html", False),
    ],
)
def test_a_png_is_for_those_who_name_it_and_not_json(
    client: httpx.Client, working: Runner, accept: str, png: bool
) -> None:
    response = client.post("/generate", json={"labels": LISTS, "steps": 1}, headers={"accept": accept})
    assert (response.headers["content-type"] == "image/png") == png
