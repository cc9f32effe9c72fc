"""The guard: with keys each owner sees only their own jobs; without keys the service is for this machine alone."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis import Redis
from starlette.datastructures import Headers

from service.api.access.api_keys import NOBODY, KeyRing, hash_of, new_key
from service.api.access.guard import PUBLIC, Guard, check_listening, is_loopback
from service.api.app import create_app
from service.contract.errors import NotLocal
from service.settings import Settings, StartError
from service.store import workers
from service.store.jobs import JobStore
from tests.conftest import serving
from tests.service.conftest import Command
from tests.service.store.helpers import add_job, record

BODY = {"labels": [["red cube"]]}
ASYNC = {"prefer": "respond-async"}
ALICE, BOB = new_key(), new_key()


def entry(name: str, key: str) -> str:
    return f"{name}:{hash_of(key)}"


@pytest.fixture(scope="module")
def keyed(settings: Settings) -> Settings:
    return settings.model_copy(update={"api_keys": f"{entry('alice', ALICE)}, {entry('bob', BOB)}"})


@pytest.fixture(scope="module")
def module_client(keyed: Settings) -> Iterator[httpx.Client]:
    with serving(keyed) as client:
        yield client


@pytest.fixture
def client(module_client: httpx.Client, connection: Redis, settings: Settings) -> httpx.Client:
    """A client of an API with keys, and a worker that is announced and does nothing."""
    workers.announce(connection, "w", {}, lease_s=60)
    return module_client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def submitted(client: httpx.Client, key: str, **headers: str) -> str:
    response = client.post("/generate", json=BODY, headers={**ASYNC, **bearer(key), **headers})
    assert response.status_code == 202, response.text
    job_id: str = response.json()["id"]
    return job_id


@pytest.mark.parametrize("headers", [{}, {"authorization": f"Basic {ALICE}"}, bearer("lg_wrong")])
def test_without_a_known_key_nothing_is_answered(client: httpx.Client, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/jobs"), ("POST", "/generate"), ("GET", "/nowhere")):
        response = client.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.json()["type"] == "urn:labelgrid:problem:no-key"
        assert response.headers["www-authenticate"].startswith('Bearer realm="labelgrid"')


def test_every_route_that_is_not_public_needs_a_key_and_documents_it(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answer = client.request(method, path.replace("{", "").replace("}", ""))
            assert answer.status_code == (200 if path in PUBLIC else 401), path
            assert ("security" in operation) == (path not in PUBLIC), f"{method} {path}"


def test_a_job_does_not_exist_for_another_key(client: httpx.Client) -> None:
    job_id, his = submitted(client, ALICE), submitted(client, BOB)
    tried = 0
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        if "{job_id}" not in path:
            continue
        for method in operations:
            paths = [path.replace("{index}", "0").replace("{job_id}", one) for one in (job_id, "x")]
            there, not_there = (client.request(method, one, headers=bearer(BOB)).json() for one in paths)
            assert there["type"] == not_there["type"] == "urn:labelgrid:problem:unknown-job", f"{method} {path}"
            assert there["detail"].replace(job_id, "x") == not_there["detail"]
            tried += 1
    assert tried >= 5
    assert [job["id"] for job in client.get("/jobs", headers=bearer(BOB)).json()["jobs"]] == [his]
    as_rfc_9110 = {"authorization": f"bearer  {ALICE}"}
    assert client.get(f"/jobs/{job_id}", headers=as_rfc_9110).json()["status"] == "queued"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("[::1]", True),
        ("LOCALHOST.", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
    ],
)
def test_only_loopback_is_listened_on_without_keys(settings: Settings, host: str, local: bool) -> None:
    assert is_loopback(host) == local
    for update in ({}, {"published_on": host}):
        chosen = settings.model_copy(update=update)
        listens_on = "0.0.0.0" if update else host
        if local:
            check_listening(chosen, listens_on)
            continue
        with pytest.raises(StartError, match="LABELGRID_API_KEYS"):
            check_listening(chosen, listens_on)
        for allowed in ({"allow_no_keys": True}, {"api_keys": entry("a", ALICE)}, {"api_keys_file": Path("keys")}):
            check_listening(chosen.model_copy(update=allowed), listens_on)


def test_the_command_refuses_to_listen_publicly_without_keys(command: Command) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LABELGRID_")}
    code, _, err = command("api", "--host", "0.0.0.0", "--port", "1", environment=environment)
    assert code == 1
    assert "without API keys the API listens on loopback only, not on 0.0.0.0" in err


def test_without_keys_a_rebound_host_name_is_refused(session_client: httpx.Client, connection: Redis) -> None:
    host = "rebound.example.com:8000"
    response = session_client.get("/jobs", headers={"host": host})
    assert (response.status_code, response.json()["type"]) == (403, "urn:labelgrid:problem:not-local")
    for own in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert session_client.get("/jobs", headers={"host": own}).status_code == 200
    assert session_client.get("/metrics", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("server", "published_on", "allowed"),
    [
        (("172.17.0.2", 8000), "", False),
        (("172.17.0.2", 8000), "127.0.0.1", True),  # a container's, reached through its host's loopback
        (("127.0.0.1", 8000), "", True),
        (("/run/labelgrid.sock", None), "", True),
    ],
)
def test_without_keys_another_address_than_loopback_is_refused_unless_the_host_publishes_it_there(
    settings: Settings, server: tuple[str, int | None], published_on: str, allowed: bool
) -> None:
    own = settings.model_copy(update={"published_on": published_on})
    guard = Guard(create_app(own), KeyRing("", None), own, ())
    scope = {"type": "http", "method": "GET", "path": "/jobs", "server": server, "headers": [(b"host", b"localhost")]}
    with contextlib.nullcontext() if allowed else pytest.raises(NotLocal):
        assert guard._owner(scope, Headers(scope=scope)) == NOBODY


OWN, OTHER = "http://127.0.0.1:8000", "http://127.0.0.1:3000"
FORWARDED = {"x-forwarded-host": "pictures.example.com, 10.0.0.1"}
TAKEN: list[dict[str, str]] = [
    {},  # no browser
    {"sec-fetch-site": "same-origin", "origin": "https://pictures.example.com"},  # a proxy changes Host
    {"sec-fetch-site": "none"},  # the user's own doing
    {"origin": OWN},
    {"origin": "https://pictures.example.com", **FORWARDED},
]
REFUSED = [
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "origin": "https://evil.example.com"},
    {"sec-fetch-site": "same-site", "origin": OTHER},
    {"sec-fetch-site": "cross-site"},
    {"origin": "https://evil.example.com", **FORWARDED},
    *({"origin": origin} for origin in (OTHER, "https://[evil", "null", "")),
]


@pytest.mark.parametrize("allow_no_keys", [False, True])
def test_without_keys_pages_of_other_sites_change_nothing(
    settings: Settings, alive: JobStore, allow_no_keys: bool
) -> None:
    usual = {"host": "127.0.0.1:8000", **ASYNC}
    with serving(settings.model_copy(update={"allow_no_keys": allow_no_keys})) as client:

        def ask(headers: dict[str, str]) -> httpx.Response:
            return client.post("/score", files={"file": b'[["red cube"]]'}, headers={**usual, **headers})

        for headers in REFUSED:
            response = ask(headers)
            assert (response.status_code, response.json()["type"]) == (403, "urn:labelgrid:problem:cross-site"), headers
        assert client.get("/jobs", headers=usual).json()["jobs"] == []
        assert [ask(headers).status_code for headers in TAKEN] == [202] * len(TAKEN)


def test_with_keys_a_page_of_any_site_may_use_one(client: httpx.Client) -> None:
    assert submitted(client, ALICE, **{"sec-fetch-site": "cross-site", "origin": "https://pages.example.com"})


@pytest.mark.parametrize("path", ["/", "/labels", "/jobs", "/static/app.js", "/no"])
def test_an_answer_to_head_has_the_headers_of_get_and_no_body(
    session_client: httpx.Client, alive: JobStore, path: str
) -> None:
    expected = session_client.get(path)
    found = httpx.head(session_client.base_url.join(path))  # whose hooks know no HEAD
    assert (found.status_code, found.content) == (expected.status_code, b"")
    assert found.headers["content-type"] == expected.headers["content-type"]
    assert found.headers["content-length"] == expected.headers["content-length"]


def test_head_of_a_stream_ends_with_its_headers(session_client: httpx.Client, alive: JobStore) -> None:
    job = record(1)
    add_job(alive, job)
    found = httpx.head(session_client.base_url.join(f"/jobs/{job.id}/events"), timeout=10)
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-type"].startswith("text/event-stream")
