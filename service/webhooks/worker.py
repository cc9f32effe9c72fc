"""Sends webhooks: a signed POST for each event that a job asked for, retried with exponential back-off.

`store/webhook_outbox.py` holds the events to send: the function that changes a job's status adds them, so none is lost
with a process. RQ only wakes the worker at once; what RQ loses is found in the outbox. Attempts run at the same time
(`turns.py`). Their number lies beside the job, in job:ID:webhook:EVENT. Follows https://www.standardwebhooks.com.
Imports no torch.
"""

import asyncio
import contextlib
import json
import random
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError
from structlog.contextvars import bound_contextvars

from service import alive_file
from service.contract.errors import ServiceError
from service.contract.records import JobRecord
from service.rq_worker import QueueWorker
from service.settings import Settings
from service.store import keys
from service.store.connection import RetryUntilStopped, connect, text
from service.store.jobs import JobStore
from service.store.reader import JobReader
from service.store.webhook_outbox import RUN_DELIVERY
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.webhooks.addresses import AddressNotAllowed, resolve
from service.webhooks.signing import signature, signing_key
from service.webhooks.turns import Turns

log = get_logger(__name__)

SENDING_S = 60.0  # longer than any attempt; if a worker dies in one, another may try again after this
LOOKUPS = 256  # of host names at the same time; one that hangs outlives its attempt
LOOK_EVERY_S = 5  # at the outbox, beside RQ's maintenance
DUE_AT_ONCE = 1000  # new ones that are taken from the outbox in one go, so that RQ's queue is read in between

# RQ calls a job's function by its name, so the worker must be reachable from the module.
_worker: "WebhookWorker | None" = None


def deliver(job_id: str, event: str) -> None:
    """Have an attempt made as soon as its owner and receiver have a slot."""
    assert _worker is not None, "deliver runs in a process of `python -m service webhooks` only"
    _worker.take(f"{job_id} {event}")


class Undeliverable(RuntimeError):
    """The message can never be sent."""


class Refused(RuntimeError):
    """The receiver did not accept the message."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the receiver answered {status}")
        self.status = status


async def post(url: str, headers: dict[str, str], body: bytes, allow_private: bool, tls: ssl.SSLContext) -> int:
    """Send one message and return the status of the answer, whose body is not read.

    The host is resolved once, and the addresses that were checked are called: a second look-up could return others.
    Redirects and proxies are not used.
    """
    parsed = httpx.URL(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    addresses = await resolve(parsed.host, port, allow_private)
    extensions = {"sni_hostname": parsed.host}  # for the certificate as well
    headers = {**headers, "Host": parsed.netloc.decode()}
    # The caller has a time limit for the whole attempt.
    async with httpx.AsyncClient(verify=tls, trust_env=False, follow_redirects=False, timeout=None) as client:
        for address in addresses:
            target = parsed.copy_with(host=address)
            try:
                async with client.stream(
                    "POST", target, content=body, headers=headers, extensions=extensions
                ) as answer:
                    return answer.status_code
            except httpx.ConnectError:
                if address == addresses[-1]:
                    raise
    raise AssertionError("a host that resolves has at least one address")


class Sender:
    """Makes attempts, and decides what follows each of them. Threads may share it."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection, self.settings = connection, settings
        self.store = JobStore(connection, settings)
        self.tls = ssl.create_default_context()
        # One loop for all attempts: asyncio.run would wait for a look-up of a name that has hung for longer than the
        # attempt may take.
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(LOOKUPS))
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def attempt(self, job_id: str, event: str) -> None:
        """Send the message unless it has been sent or is being sent; schedule the next attempt if that fails."""
        member, key, sending = f"{job_id} {event}", keys.webhook(job_id, event), keys.sending(job_id, event)
        if not self.connection.set(sending, 1, nx=True, px=int(SENDING_S * 1000)):
            return
        try:  # what follows is read once no other attempt is in progress, which could end in between
            due_at = self.connection.zscore(keys.WEBHOOKS, member)
            if due_at is None or (due_at > time.time() and self.connection.exists(key)):
                return  # another process has just made this attempt
            record = self.store.record(job_id)
            number = int(self.connection.hincrby(key, "attempts", 1))
            self.connection.expire(key, self.settings.keep_s + self.settings.job_timeout_s)
            ids = record.log_ids if record else {"job_id": job_id}
            with bound_contextvars(**ids, webhook_event=event, attempt=number):
                self._attempt(member, number, record, event)
        finally:
            self.connection.delete(sending)

    def _attempt(self, member: str, number: int, record: JobRecord | None, event: str) -> None:
        try:
            parent, job_id = (record.traceparent, record.id) if record else ("", "")
            with tracing.span("webhook", parent, {"job_id": job_id, "event": event, "attempt": number}):
                asyncio.run_coroutine_threadsafe(self._send(record, event), self.loop).result()
        except (AddressNotAllowed, Undeliverable, ServiceError) as error:
            log.warning("webhook cannot be sent", reason=str(error))
        except (OSError, httpx.HTTPError, Refused) as error:
            reason = str(error) or type(error).__name__
            is_gone = isinstance(error, Refused) and error.status == 410
            if number < self.settings.webhook_attempts and not is_gone:
                # Four times as long after each attempt, plus up to a quarter, so that retries spread out.
                wait_s = self.settings.webhook_backoff_s * 4 ** (number - 1) * random.uniform(1.0, 1.25)
                self.connection.zadd(keys.WEBHOOKS, {member: time.time() + wait_s}, xx=True)
                log.info("webhook put off", reason=reason, wait_s=round(wait_s, 1))
                return
            log.warning("webhook given up", reason=reason)
        else:
            log.info("webhook delivered")
        self.connection.zrem(keys.WEBHOOKS, member)

    async def _send(self, record: JobRecord | None, event: str) -> None:
        """Send one message.

        AddressNotAllowed, Undeliverable or ServiceError if it can never be sent; another error if it can be retried.
        """
        if record is None or record.webhook is None or self.settings.webhook_secret is None:
            raise Undeliverable("the job has expired, or LABELGRID_WEBHOOK_SECRET is not set")
        async with asyncio.timeout(self.settings.webhook_timeout_s):
            async with AsyncRedis.from_url(self.settings.redis_url, protocol=2) as client:
                job = await JobReader(client, self.settings.keep_s).job(record.id)
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            body = json.dumps({"type": f"job.{event}", "timestamp": now, "data": job.model_dump(mode="json")}).encode()
            message_id, timestamp = f"{record.id}.{event}", int(time.time())
            key = signing_key(self.settings.webhook_secret.get_secret_value(), record.owner)
            headers = {
                "Content-Type": "application/json",
                "User-Agent": "labelgrid",
                "webhook-id": message_id,
                "webhook-timestamp": str(timestamp),
                "webhook-signature": signature(key, message_id, timestamp, body),
            }
            status = await post(record.webhook, headers, body, self.settings.webhook_allow_private, self.tls)
        if not 200 <= status < 300:
            raise Refused(status)


class WebhookWorker(QueueWorker):
    """Takes up the events that RQ announces and those that are due in the outbox."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(sender.store.webhooks, uuid4().hex, RUN_DELIVERY, LOOK_EVERY_S)
        self.sender = sender
        self.turns = Turns(lambda member: sender.attempt(*member.split(" ", 1)))

    def take(self, member: str) -> None:
        """Have the attempt of "ID EVENT" made. One of a job that only another version can read is left to it."""
        with contextlib.suppress(ValueError):
            record = self.sender.store.record(member.partition(" ")[0])
            owner, url = (record.owner, record.webhook or "") if record else ("", "")
            self.turns.add(member, owner, httpx.URL(url).netloc.decode())

    def take_due(self) -> None:
        """Take up what is due in the outbox."""
        due: Any = self.sender.connection.zrangebyscore(keys.WEBHOOKS, "-inf", time.time())
        new = [member for raw in due if (member := text(raw)) not in self.turns]
        for member in new[:DUE_AT_ONCE]:
            self.take(member)

    def run_maintenance_tasks(self) -> None:
        alive_file.touch(self.sender.settings)
        super().run_maintenance_tasks()
        self.take_due()

    def teardown(self) -> None:
        self.turns.stop()
        super().teardown()


def main(settings: Settings) -> None:
    """Send until SIGTERM or Ctrl-C; the attempts in progress are completed first."""
    global _worker

    def is_stopping() -> bool:
        alive_file.touch(settings)  # a process that waits for Redis lives
        return _worker is not None and _worker.stop_requested

    alive_file.reset(settings)
    retry = RetryUntilStopped(is_stopping)
    _worker = WebhookWorker(Sender(connect(settings.redis_url, retry=retry), settings))
    try:
        _worker.work(logging_level="WARNING")
    except RedisError:  # away while the worker registers
        if not _worker.stop_requested:
            raise
