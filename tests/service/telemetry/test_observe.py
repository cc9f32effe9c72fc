"""Every request has an id, in its response, its problem and its log line."""

import socket

import httpx
import pytest
from redis import Redis

from service.files import PictureFiles
from service.settings import Settings
from service.store.jobs import JobStore
from tests.conftest import api_server, serving
from tests.service.api.routes.test_jobs import finished
from tests.service.telemetry.conftest import SECRET, Lines

BODY = {"labels": [["red cube"], ["blue sphere"]], "steps": 2}


def test_a_repeated_request_is_logged_with_its_job(client: httpx.Client, alive: JobStore, lines: Lines) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}
    (job_id,) = {client.post("/generate", json=BODY, headers=headers).json()["id"] for _ in range(2)}
    assert [line["job_id"] for line in lines.wait(2, event="request")] == [job_id] * 2


def test_a_problem_its_header_and_its_log_line_have_one_request_id(
    client: httpx.Client, alive: JobStore, lines: Lines
) -> None:
    ids = set()
    for path, status in [("/jobs/none", 404), ("/generate", 405), ("/nowhere", 404)]:
        response = client.get(path)
        assert response.status_code == status
        assert response.json()["request_id"] == response.headers["x-request-id"]
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 3
    assert {line["request_id"] for line in lines.wait(3, event="request")} == ids


@pytest.mark.parametrize("given", ["two words", "x" * 129, "ü"])
def test_an_invalid_request_id_is_replaced(client: httpx.Client, alive: JobStore, given: str) -> None:
    used = client.get("/labels", headers={"x-request-id": given.encode()}).headers["x-request-id"]
    assert used != given
    assert len(used) == 32


def test_an_unexpected_error_is_logged_with_the_id_in_its_response(
    settings: Settings, lines: Lines, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError(f"at redis://:hunter2@redis:6379/0 with {SECRET}")

    monkeypatch.setattr("service.api.catalog.Catalog.models", fail)
    with serving(settings) as client:
        response = client.get("/models", headers={"x-request-id": "odd"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == response.json()["request_id"] == "odd"
    (request,) = lines.wait(1, event="request")
    (error,) = lines.read_all(level="error", request_id="odd")
    assert "ZeroDivisionError: at redis://:***@redis:6379/0 with ***" in error["exception"]
    assert (request["status"], request["request_id"]) == (500, "odd")


@pytest.mark.parametrize(
    ("path", "kind"), [("/generate", "application/json"), ("/score", "multipart/form-data; boundary=x")]
)
def test_a_client_that_leaves_in_its_body_is_no_error_of_the_service(
    settings: Settings, connection: Redis, lines: Lines, path: str, kind: str
) -> None:
    with api_server(settings) as server:
        address = server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address) as client:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 100\r\n"
            client.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 100")  # the route reads the body now
        (request,) = lines.wait(1, event="request")
        assert (request["path"], request["status"]) == (path, 499)
        assert lines.read_all(level="error") == []


def test_a_zip_whose_job_is_deleted_meanwhile_is_cut_off_with_one_warning(
    client: httpx.Client, alive: JobStore, lines: Lines
) -> None:
    job_id, _ = finished(alive, 20)
    files = PictureFiles(alive.settings.pictures)
    (files.folder(job_id) / "19.png").unlink()  # it is read after the first ones are sent
    with pytest.raises(httpx.RemoteProtocolError):
        client.get(f"/jobs/{job_id}/pictures.zip")
    lines.wait(1, event="request")
    assert [line["reason"] for line in lines.read_all(event="answer is cut off")] == [
        f"the results of job '{job_id}' have expired or were deleted; generate them again"
    ]
    assert not any("exception" in line for line in lines.read_all())
