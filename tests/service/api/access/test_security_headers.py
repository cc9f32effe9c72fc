"""Rate limits by key, and the headers that keep browsers from making more of an answer than it is."""

import base64
import hashlib
import math
import re
import time

import httpx
import pytest
from redis import Redis

from service.api.access.keys import hash_of, new_key
from service.api.access.rate_limit import BadLimit
from service.api.access.security_headers import DEFAULTS
from service.api.app import create_app
from service.settings import Settings
from tests.conftest import serving

KEYS = {name: new_key() for name in ("alice", "bob")}


def limited(settings: Settings, limit: str) -> Settings:
    listed = ",".join(f"{name}:{hash_of(key)}" for name, key in KEYS.items())
    return settings.model_copy(update={"api_keys": listed, "rate_limit": limit})


def get(client: httpx.Client, name: str, path: str = "/jobs") -> httpx.Response:
    return client.get(path, headers={"authorization": f"Bearer {KEYS[name]}"})


def test_each_key_has_a_limit_of_its_own_for_all_processes(settings: Settings, connection: Redis) -> None:
    with serving(limited(settings, "5/minute")) as one, serving(limited(settings, "5/minute")) as other:
        assert [get(client, "alice").status_code for client in (one, other, one, other, one)] == [200] * 5
        for client in (one, other):
            refused = get(client, "alice")
            assert (refused.status_code, refused.json()["type"]) == (429, "urn:labelgrid:problem:too-many-requests")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert get(client, "bob").status_code == 200
            assert client.get("/healthz").status_code == 200
            assert client.get("/jobs").status_code == 401


def test_who_waits_as_told_goes_on(settings: Settings, connection: Redis) -> None:
    with serving(limited(settings, "4/second")) as client:
        waited = 0
        for _ in range(9):
            while (answer := get(client, "alice")).status_code == 429:
                waited += int(answer.headers["retry-after"])
                time.sleep(int(answer.headers["retry-after"]))
        assert waited >= math.ceil(9 / 4) - 1


def test_without_keys_there_is_no_limit(settings: Settings, connection: Redis) -> None:
    with serving(settings.model_copy(update={"rate_limit": "1/hour"})) as client:
        assert [client.get("/jobs").status_code for _ in range(3)] == [200] * 3


def test_a_limit_that_cannot_be_read_stops_the_start(settings: Settings) -> None:
    with pytest.raises(BadLimit, match="'many', wanted one such as 3000/minute"):
        create_app(settings.model_copy(update={"rate_limit": "many"}))


def test_a_limit_needs_redis_and_says_so(settings: Settings) -> None:
    away = limited(settings, "5/minute").model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with serving(away) as client:
        assert get(client, "alice").status_code == 503


@pytest.mark.parametrize("path", ["/healthz", "/labels", "/jobs", "/nowhere", "/jobs/nobody", "/openapi.json"])
def test_every_answer_has_the_headers(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert {name: headers.get(name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_run_only_what_this_service_serves(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    allowed = policy["script-src"].split()
    assert not any("unsafe" in source or "//" in source or "*" in source for source in allowed)
    for attributes, script in re.findall(r"<script([^>]*)>(.*?)</script>", answer.text, re.DOTALL):
        source = re.search(r'src="([^"]+)"', attributes)
        if source is None:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in allowed
        else:
            assert client.get(f"/{source[1]}").status_code == 200
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', answer.text)
    assert answer.headers["x-frame-options"] == "DENY"
