"""A real receiver of webhooks, in a process of its own, and jobs that want some."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from standardwebhooks import Webhook

from service.contract.records import WebhookEvent
from service.settings import Settings
from service.store import keys
from service.store.async_jobs import AsyncJobs
from service.store.connection import connect_async
from service.store.jobs import JobStore
from service.webhooks.sender import Sender, receiver_secret, signing_key
from tests.paths import ROOT
from tests.service.processes import until
from tests.service.store.helpers import add_job, record

SECRET = "a secret that is long enough"
ENDS: tuple[WebhookEvent, ...] = ("finished", "failed", "cancelled")


class Receiver:
    """The process of tests/receiver.py; `statuses` are its answers."""

    def __init__(self, folder: Path, *statuses: int, certificate: Path | None = None) -> None:
        port_file, self.log = folder / "port", folder / "log"
        command = [sys.executable, "-m", "tests.receiver", str(port_file), str(self.log), *map(str, statuses)]
        environment = {**os.environ, **({"RECEIVER_CERTIFICATE": str(certificate)} if certificate else {})}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)
        until(port_file.exists)
        self.port = int(port_file.read_text())
        self.url = f"http://127.0.0.1:{self.port}/hook?x=1"

    def got(self) -> list[dict[str, Any]]:
        """Return the messages received so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Receiver]]:
    """Start receivers, which end with the test."""
    started = list[Receiver]()

    def start(*statuses: int, certificate: Path | None = None) -> Receiver:
        started.append(Receiver(tmp_path, *statuses, certificate=certificate))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def hooked(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with webhooks, also to private addresses, and short waits."""
    monkeypatch.setattr("service.webhooks.sender.BACKOFF_S", 0.05)
    update = {"webhook_secret": SecretStr(SECRET), "webhook_allow_private": True}
    return settings.model_copy(update={**update, "webhook_attempts": 3, "webhook_timeout_s": 60.0})


@pytest.fixture
def store(connection: Redis, hooked: Settings) -> JobStore:
    return JobStore(connection, hooked)


def with_sender(settings: Settings, do: Callable[[Sender], Awaitable[None]]) -> None:
    """Run something with a Sender, in an event loop of its own."""

    async def run() -> None:
        async with connect_async(settings.redis_url, timeout_s=15, max_connections=64) as connection:
            sender = Sender(AsyncJobs(connection, settings), settings)
            await do(sender)
            await sender.close()

    asyncio.run(run())


def attempt(settings: Settings, job_id: str, event: str) -> None:
    """Make an attempt if it is due."""
    with_sender(settings, lambda sender: sender.attempt(job_id, event))


def send_due(settings: Settings) -> None:
    """Do what the API does at one look at the outbox."""

    async def look(sender: Sender) -> None:
        await sender.take_due()
        await sender.idle()

    with_sender(settings, look)


def create_job(store: JobStore, url: str, events: tuple[WebhookEvent, ...] = ENDS, owner: str = "") -> str:
    """Create a job with a webhook and return its id."""
    return add_job(store, record(1, owner, webhook=url, webhook_events=events))


def outbox(store: JobStore) -> list[str]:
    found: Any = store.connection.zrange(keys.WEBHOOKS, 0, -1)
    return list(found)


def verified(message: dict[str, Any], owner: str = "") -> dict[str, Any]:
    """Return a message's content if another implementation of Standard Webhooks accepts its signature."""
    secret = receiver_secret(signing_key(SECRET, owner))
    content: dict[str, Any] = Webhook(secret).verify(message["body"], message["headers"])
    return content
