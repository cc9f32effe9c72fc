"""Rate limits: each key has its own, and all API processes count together."""

import socket
import time

import httpx
import pytest
from redis import Redis

from service.api.access.api_keys import hash_of, new_key
from service.api.app import create_app
from service.settings import Settings, StartError
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


@pytest.mark.parametrize("path", ["/v1/models/x%0a", "/jobs/x%1b[2J"])
def test_nothing_has_an_address_with_control_characters(settings: Settings, connection: Redis, path: str) -> None:
    with serving(limited(settings, "100/minute")) as client:
        client.event_hooks = {}  # the OpenAPI document has no such address
        answer = client.get(path, headers={"authorization": f"Bearer {KEYS['alice']}"})
        assert answer.status_code == 404
        assert answer.json()["detail"] == "nothing has an address with control characters"


def test_without_keys_there_is_no_limit(settings: Settings, connection: Redis) -> None:
    with serving(settings.model_copy(update={"rate_limit": "1/hour"})) as client:
        assert [client.get("/jobs").status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize("limit", ["many", "5/minute;10/hour", "1/0 minutes"])
def test_a_malformed_limit_stops_the_start(settings: Settings, limit: str) -> None:
    with pytest.raises(StartError, match=f"'{limit}'; wanted one limit such as 3000/minute"):
        create_app(settings.model_copy(update={"rate_limit": limit}))


def test_a_redis_that_hangs_delays_nobody_who_does_not_need_it(settings: Settings, connection: Redis) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"redis://127.0.0.1:{hanging.getsockname()[1]}/0"
        with serving(limited(settings, "5/minute").model_copy(update={"redis_url": url})) as client:
            client.headers["authorization"] = f"Bearer {KEYS['alice']}"
            begun = time.monotonic()
            assert [client.get("/labels").status_code for _ in range(3)] == [200] * 3
            assert time.monotonic() - begun < 5
