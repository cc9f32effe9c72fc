"""Bodies in JSON and multipart forms: types, sizes and fields that are refused, and lists in forms."""

import asyncio
import json
import socket

import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access import guard
from service.api.access.api_keys import KeyRing
from service.api.access.guard import BODY_LIMIT_BYTES, Guard
from service.settings import Settings
from service.store.jobs import JobStore
from shared.options import LIMITS
from tests.service.api.answers import JSON, LISTS, nothing_is_queued, problem


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", None])
def test_json_with_another_content_type_is_refused(client: httpx.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = client.post("/generate", content=b'{"labels": [["red cube"]]}', headers=headers)
    found = problem(response, 422, "invalid-request")
    assert found["detail"] == f"content-type: {content_type or 'none'}; wanted application/json"


def test_a_body_that_is_too_large(client: httpx.Client, alive: JobStore) -> None:
    large = json.dumps({"labels": LISTS, "model": "x" * BODY_LIMIT_BYTES}).encode()
    problem(client.post("/generate", content=large, headers=JSON), 413, "content-too-large")
    chunks = (large[i : i + 65536] for i in range(0, len(large), 65536))  # without a Content-Length
    problem(client.post("/generate", content=chunks, headers=JSON), 413, "content-too-large")
    problem(client.post("/score", files={"file": large}), 413, "content-too-large")
    assert nothing_is_queued(alive.connection)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow bodies of 1024 bytes, and forms of 2048."""
    monkeypatch.setattr(guard, "BODY_LIMIT_BYTES", 1024)
    monkeypatch.setattr(guard, "UPLOAD_LIMIT_BYTES", 2048)


def limiting(app: ASGIApp) -> Guard:
    """A guard in front of a public address."""
    return Guard(app, KeyRing("", None), Settings(), [])


def request_with(*headers: tuple[bytes, bytes]) -> Scope:
    return {"type": "http", "method": "POST", "path": "/", "headers": [*headers]}


@pytest.mark.usefixtures("limits")
def test_a_body_that_is_announced_too_large_is_refused_before_it_comes() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": True}

    async def send(message: Message) -> None:
        raise AssertionError

    limited, length = limiting(app), (b"content-length", b"1025")
    with pytest.raises(HTTPException, match="413: the body has more than 1024 bytes"):
        asyncio.run(limited(request_with(length), receive, send))
    form = (b"content-type", b"multipart/form-data; boundary=x")
    asyncio.run(limited(request_with(length, form), receive, send))


def test_json_of_very_many_parts_is_not_parsed(client: httpx.Client, alive: JobStore) -> None:
    body = json.dumps({"layouts": [[]] * LIMITS.max_parts}).encode()
    found = problem(client.post("/generate", content=body, headers=JSON), 413, "content-too-large")
    assert found["detail"] == "the body has more than 10000 lists and objects"
    found = problem(client.post("/score", files={"file": body}), 413, "content-too-large")
    assert found["detail"] == "the file `file` has more than 10000 lists and objects"


@pytest.mark.usefixtures("limits")
def test_the_bodies_of_one_owner_have_a_limit_together() -> None:
    """Each has been sent in part, and its request is in progress."""
    sent = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await sent.wait()

    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(1024), "more_body": True}

    async def send(message: Message) -> None:
        raise AssertionError

    async def run() -> list[str]:
        limited = limiting(app)

        def request(owner: str) -> asyncio.Task[None]:
            return asyncio.create_task(limited({**request_with(), "state": {"owner": owner}}, receive, send))

        tasks = [request("alice") for _ in range(9)] + [request("bob")]
        await asyncio.sleep(0)
        sent.set()
        found = [str(error) for error in await asyncio.gather(*tasks, return_exceptions=True) if error]
        await asyncio.gather(*(request("alice") for _ in range(4)))  # all were given back
        return found

    assert asyncio.run(run()) == 5 * ["429: your other requests are too large; try again"]


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(("content_type", "most"), [(b"multipart/form-data; boundary=x", 9), (b"application/json", 4)])
def test_forms_count_until_their_requests_wait_and_other_bodies_until_the_answer(
    content_type: bytes, most: int
) -> None:
    """A form's files are closed before the wait; a JSON body stays in memory."""
    answered, waiting = asyncio.Event(), list[Scope]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def send(message: Message) -> None:
        raise AssertionError

    async def run() -> list[str]:
        limited = limiting(app)

        def request() -> asyncio.Task[None]:
            scope = {**request_with((b"content-type", content_type)), "state": {"owner": "alice"}}
            messages = iter([{"type": "http.request", "body": bytes(1024), "more_body": False}])

            async def receive() -> Message:
                if (message := next(messages, None)) is not None:
                    return message
                waiting.append(scope)
                await answered.wait()
                return {"type": "http.disconnect"}

            return asyncio.create_task(limited(scope, receive, send))

        tasks = []
        for _ in range(9):  # one after the other
            tasks.append(request())
            await asyncio.sleep(0)
        answered.set()
        return [str(error) for error in await asyncio.gather(*tasks, return_exceptions=True) if error]

    assert asyncio.run(run()) == (9 - most) * ["429: your other requests are too large; try again"]
    assert len(waiting) == most


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/docs"])
def test_a_body_that_no_route_reads_is_no_error(
    client: httpx.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 99999999\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as one:
        one.sendall(head.encode() + bytes(100))
        assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")
        one.shutdown(socket.SHUT_WR)
        while one.recv(1 << 16):
            pass
    assert [line for line in caplog.records if line.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        (b"[[", {}, "not JSON"),
        (b'[["red kube"]]', {}, 'did you mean "red cube"?'),
        (b'[["red cube"]]', {"repeats": "2.5"}, "repeats"),
        (b'[["red cube"]]', {"steps": "null"}, "steps"),
        (b'[["red cube"]]', {"guidance_interval": "0.25"}, "guidance_interval"),
        (b'[["red cube"]]', {"unheard": "of"}, "unheard"),
        (b'[["red cube"]]', {"seed": str(2**53 - 1), "repeats": "2"}, "seed"),
        (None, {"repeats": "2"}, "file"),
    ],
)
def test_forms_that_cannot_be_scored(
    client: httpx.Client, alive: JobStore, file: bytes | None, fields: dict[str, str], words: str
) -> None:
    files = {"file": ("test.json", file)} if file is not None else {"other": ("x", b"x")}
    assert words in problem(client.post("/score", data=fields, files=files), 422, "invalid-request")["detail"]
    assert nothing_is_queued(alive.connection)


def test_a_malformed_form(client: httpx.Client, alive: JobStore) -> None:
    broken = {"content-type": "multipart/form-data; boundary=x"}
    problem(client.post("/score", content=b"--y\r\n", headers=broken), 400, "bad-request")
    problem(client.post("/score", content=b"x", headers={"content-type": "multipart/form-data"}), 400, "bad-request")
    assert nothing_is_queued(alive.connection)


def test_a_list_in_a_form(client: httpx.Client, alive: JobStore) -> None:
    given = {"data": {"guidance_interval": ["0.25", "0.75"], "steps": "4"}, "files": {"file": json.dumps(LISTS)}}
    job = client.post("/score", headers={"prefer": "respond-async"}, **given).json()  # type: ignore[arg-type]
    assert job["options"]["guidance_interval"] == [0.25, 0.75]
