"""Rate limits: each key has its own, and all API processes count together."""

import asyncio
import socket
import time
from unittest.mock import AsyncMock

import httpx
import pytest
from limits.aio.storage import RedisStorage
from redis import Redis

from service.api.access.keys import hash_of, new_key
from service.api.access.rate_limit import BadLimit, RateLimiter, read_limit
from service.api.app import create_app
from service.openai.sizes import cost_of_scaling
from service.settings import Settings
from service.store.connection import connect_async
from service.store.jobs import JobStore
from tests.conftest import serving

KEYS = {name: new_key() for name in ("alice", "bob")}


def limited(settings: Settings, limit: str) -> Settings:
    listed = ",".join(f"{name}:{hash_of(key)}" for name, key in KEYS.items())
    return settings.model_copy(update={"api_keys": listed, "rate_limit": limit})


def get(client: httpx.Client, name: str) -> httpx.Response:
    return client.get("/jobs", headers={"authorization": f"Bearer {KEYS[name]}"})


def test_each_key_has_a_limit_of_its_own_for_all_processes(settings: Settings, connection: Redis) -> None:
    with serving(limited(settings, "5/minute")) as one, serving(limited(settings, "5/minute")) as other:
        assert [get(client, "alice").status_code for client in (one, other, one, other, one)] == [200] * 5
        for client in (one, other):
            refused = get(client, "alice")
            assert (refused.status_code, refused.json()["type"]) == (429, "urn:labelgrid:problem:too-many-requests")
            assert 1 < int(refused.headers["retry-after"]) <= 60
            assert get(client, "bob").status_code == 200
            assert client.get("/healthz").status_code == 200
            assert client.get("/jobs").status_code == 401


JOB = "0" * 32


@pytest.mark.parametrize(("size", "cost"), [("64x64", 1), ("1024x512", 6), ("2048x2048", 42)])
def test_a_scaled_picture_counts_by_its_pixels(settings: Settings, alive: JobStore, size: str, cost: int) -> None:
    with serving(limited(settings, "43/minute")) as client:
        client.headers["authorization"] = f"Bearer {KEYS['alice']}"
        body = {"labels": [["red cube"]]}
        job_id = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()["id"]
        passed = 0
        while client.get(f"/v1/images/{job_id}/0/{size}.png").status_code != 429:
            passed += 1
        assert passed == 42 // cost


@pytest.mark.parametrize(
    ("fields", "cost"),
    [
        ({"n": 10}, 1),
        ({"n": 10, "size": "auto"}, 1),
        ({"size": "1024x512"}, 6),
        ({"n": 4, "size": "1024x512"}, 21),
        ({"n": 10, "size": "2048x2048", "response_format": "url"}, 1),
    ],
)
def test_pictures_to_scale_count_by_their_pixels(
    settings: Settings, connection: Redis, fields: dict[str, object], cost: int
) -> None:
    assert cost_of_scaling(4 * 1024 * 512) == 21
    with serving(limited(settings, "25/minute")) as client:
        client.headers["authorization"] = f"Bearer {KEYS['alice']}"
        passed = 0
        while client.post("/v1/images/generations", json={"prompt": "red cube", **fields}).status_code != 429:
            passed += 1
        assert passed == 25 // cost


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/score/conditions", "/v1/images/generations"])
def test_a_long_body_counts_by_its_bytes(settings: Settings, connection: Redis, path: str, as_stream: bool) -> None:
    with serving(limited(settings, "20/minute")) as client:
        client.headers["authorization"] = f"Bearer {KEYS['alice']}"
        body = b'{"x": "' + b"x" * 400_000 + b'"}'
        headers = {"content-type": "application/json"}
        passed = 0
        while client.post(path, content=iter([body]) if as_stream else body, headers=headers).status_code != 429:
            passed += 1
        assert passed == 20 // 5


@pytest.mark.parametrize("path", [f"/v1/images/{JOB}%0a/0/2048x2048.png", "/jobs/x%1b[2J", "/jobs/%e2%80%ae"])
def test_nothing_has_an_address_with_control_characters(settings: Settings, connection: Redis, path: str) -> None:
    with serving(limited(settings, "100/minute")) as client:
        client.event_hooks = {}  # the OpenAPI document has no such address
        answer = client.get(path, headers={"authorization": f"Bearer {KEYS['alice']}"})
        assert answer.status_code == 404
        assert answer.json()["detail"] == "nothing has an address with control characters"


def test_no_request_costs_more_than_the_limit(settings: Settings, connection: Redis) -> None:
    with serving(limited(settings, "2/minute")) as client:
        client.headers["authorization"] = f"Bearer {KEYS['alice']}"
        long = {"content": b" " * 300_000, "headers": {"content-type": "application/json"}}  # which counts as four
        assert [client.post("/generate", **long).status_code for _ in range(2)] == [400, 429]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "now", "cost", "wait_s"),
    [
        (0, 100, 1, 60),  # until this window is the one before
        (0, 80, 40, 60 + 15),  # and until a quarter of those 80 no longer count
        (0, 30, 100, 60 + 58),
        (100, 0, 1, 1),
        (100, 0, 40, 24),
        (100, 10, 40, 30),
    ],
)
def test_a_costly_request_waits_until_it_passes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, before: int, now: int, cost: int, wait_s: int
) -> None:
    """Given how many requests were counted in the window before, and in this one, which has just begun."""
    monkeypatch.setattr(RedisStorage, "acquire_sliding_window_entry", AsyncMock(return_value=False))
    monkeypatch.setattr(RedisStorage, "get_sliding_window", AsyncMock(return_value=(before, 60.0, now, 120.0)))

    async def wait() -> int | None:
        limit = read_limit("100/minute")
        assert limit is not None
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=1) as redis:
            return await RateLimiter(redis, limit).wait_s("alice", cost)

    assert asyncio.run(wait()) == wait_s


def test_without_keys_there_is_no_limit(settings: Settings, connection: Redis) -> None:
    with serving(settings.model_copy(update={"rate_limit": "1/hour"})) as client:
        assert [client.get("/jobs").status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize("limit", ["many", "5/minute;10/hour", "1/0 minutes", "0/minute", "5/fortnight"])
def test_a_malformed_limit_stops_the_start(settings: Settings, limit: str) -> None:
    with pytest.raises(BadLimit, match=f"'{limit}'; wanted one limit such as 3000/minute"):
        create_app(settings.model_copy(update={"rate_limit": limit}))


def test_a_redis_that_hangs_delays_nobody_who_does_not_need_it(settings: Settings, connection: Redis) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"redis://127.0.0.1:{hanging.getsockname()[1]}/0"
        with serving(limited(settings, "5/minute").model_copy(update={"redis_url": url})) as client:
            client.headers["authorization"] = f"Bearer {KEYS['alice']}"
            begun = time.monotonic()
            assert [client.get("/labels").status_code for _ in range(3)] == [200] * 3
            assert time.monotonic() - begun < 5


def test_without_redis_requests_are_503_and_not_limited(settings: Settings) -> None:
    away = limited(settings, "5/minute").model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with serving(away) as client:
        assert get(client, "alice").status_code == 503
