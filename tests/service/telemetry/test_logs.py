"""Logs: lines of every process about one request have the same ids, and no secrets."""

import logging
import sys

import httpx
import pytest
from pydantic import SecretStr
from redis import Redis

from service.api.access.api_keys import hash_of, new_key
from service.settings import Settings
from service.telemetry.logs import LineFormatter, get_logger
from service.worker.runner import Runner
from tests.conftest import serving
from tests.service.store.helpers import stored
from tests.service.telemetry.conftest import SECRET, Lines
from tests.service.webhooks.conftest import attempt

BODY = {"labels": [["red cube"], ["blue sphere"]], "steps": 2}


def test_api_worker_and_webhooks_log_one_request_with_the_same_ids(
    client: httpx.Client, working: Runner, lines: Lines, settings: Settings, connection: Redis
) -> None:
    response = client.post("/generate", json=BODY, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    job_id = response.json()["id"]
    (request,) = lines.wait(1, event="request")
    record = stored(working.store, job_id)
    assert record.request_id == "mine-1"
    hooked = record.model_copy(update={"webhook": "http://127.0.0.1:1/x", "webhook_events": ("finished",)})
    connection.hset(f"labelgrid:job:{job_id}", "record", hooked.model_dump_json())
    connection.zadd("labelgrid:webhooks", {f"{job_id} finished": 0})
    attempt(settings.model_copy(update={"webhook_secret": SecretStr(SECRET)}), job_id, "finished")

    about = lines.wait(4, request_id="mine-1", job_id=job_id)
    assert {(line["logger"], line["event"]) for line in about} == {
        ("service.store.jobs", "job running"),  # by the worker
        ("service.store.jobs", "job finished"),
        ("service.api.access.observe", "request"),
        ("service.webhooks.sender", "webhook cannot be sent"),  # 127.0.0.1 is private
    }
    assert {line["level"] for line in about} == {"info", "warning"}
    assert {line["role"] for line in about} == {"test"}
    assert (request["method"], request["path"], request["status"]) == ("POST", "/generate", 200)
    assert (request["kind"], request["pictures"], request["model"]) == ("generate", 2, record.model)
    assert lines.read_all() == about  # there are no other lines, and none lacks its ids


def test_no_line_contains_a_key_a_secret_or_a_password(settings: Settings, lines: Lines, connection: Redis) -> None:
    key, password = new_key(), settings.redis_url.split("@")[0].split(":")[-1]
    keyed = settings.model_copy(update={"api_keys": f"alice:{hash_of(key)}", "webhook_secret": SecretStr(SECRET)})
    unreachable = keyed.model_copy(update={"redis_url": "redis://:hunter2@127.0.0.1:1/0"})
    with serving(keyed) as client:
        client.get(f"/jobs?key={key}", headers={"authorization": f"Bearer {key}"})
        client.get("/jobs", headers={"authorization": f"Bearer {key}x"})
    with serving(unreachable) as client:
        assert client.get("/jobs", headers={"authorization": f"Bearer {key}"}).status_code == 503
    get_logger("service.x").warning("at redis://user:hunter2@host/0", header=f"Bearer {key}", secret=SECRET)
    assert [line.get("owner") for line in lines.wait(3, event="request")] == ["alice", None, "alice"]
    for secret in (key, SECRET, password, "hunter2"):
        assert secret not in lines.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_variables(settings: Settings, log_format: str) -> None:
    record = logging.LogRecord("service.x", logging.ERROR, __file__, 1, "event", None, None)
    try:
        password = "".join(["hunt", "er2"])
        raise RuntimeError(len(password))
    except RuntimeError:
        record.exc_info = sys.exc_info()
    line = LineFormatter(settings.model_copy(update={"log_format": log_format}), "test").format(record)
    assert "RuntimeError: 7" in line
    assert "hunter2" not in line


def test_a_console_line_has_nothing_that_a_terminal_obeys(settings: Settings) -> None:
    formatter = LineFormatter(settings, "api")
    record = logging.makeLogRecord({"msg": "request", "levelno": 20, "levelname": "INFO", "name": "service.x"})
    record.path = "/\x1b[2J\x07\u202e/x"
    line = formatter.format(record)
    assert line.isprintable()
    assert "/\\x1b[2J\\x07\\u202e/x" in line
