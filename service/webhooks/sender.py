"""Sends webhooks: a signed POST for each event that a job asked for, retried with exponential back-off.

A task of each API process reads the outbox in Redis, to which the functions that move jobs add (`store/jobs.lua`), and
makes one attempt for each message that is due and that no other process has taken. Follows
https://www.standardwebhooks.com.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from weakref import WeakValueDictionary

import httpx
from redis.exceptions import RedisError
from structlog.contextvars import bind_contextvars

from service.contract.errors import ServiceError
from service.contract.records import JobRecord
from service.contract.schemas import Job
from service.settings import Settings
from service.store import keys
from service.store.async_jobs import AsyncJobs
from service.store.connection import WARN_EVERY_S
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.webhooks.addresses import resolve

log = get_logger(__name__)

PLACES = 64  # attempts at the same time
OWNER_PLACES = 32  # of one owner
RECEIVER_PLACES = 8  # of one owner to one receiver, so that a receiver that never answers delays only its own messages
MOST_HELD = 1000  # messages to one receiver in memory; others are looked at again after HELD_S
HELD_S = 60.0
LEASE_S = 60.0  # longer than any attempt; if the process dies in one, another may try again after this
BACKOFF_S = 5.0  # the first pause between two attempts, and each later one four times as long
LOOK_S = 0.5  # between two looks at the outbox
LOOKUPS = 256  # threads that look up names, at most: a look-up that hangs outlives its attempt
END_S = 3.0  # for the attempts in progress when the process ends

Lane = tuple[str, str]  # an owner and one of their receivers


class Refused(RuntimeError):
    """The receiver did not accept the message."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the receiver answered {status}")
        self.status = status


def signing_key(secret: str, owner: str) -> bytes:
    """Derive the key for one owner's messages from the service's secret, which no receiver knows."""
    return hmac.digest(secret.encode(), b"labelgrid webhooks of " + owner.encode(), hashlib.sha256)


def receiver_secret(key: bytes) -> str:
    """Return a signing key in the form that receivers configure."""
    return "whsec_" + base64.b64encode(key).decode()


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the HMAC-SHA256 over id, timestamp and body, in Standard Webhooks' format."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


async def post(
    client: httpx.AsyncClient, url: str, headers: dict[str, str], body: bytes, allow_private: bool, lookups: Executor
) -> int:
    """Send one message and return the status of the answer, whose body is not read.

    The host is resolved once, and the addresses that were checked are called: a second look-up could return others.
    """
    parsed = httpx.URL(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    addresses = await resolve(parsed.host, port, allow_private, lookups)
    extensions = {"sni_hostname": parsed.host}  # for the certificate as well
    headers = {**headers, "Host": parsed.netloc.decode()}
    for address in addresses:
        target = parsed.copy_with(host=address)
        try:
            async with client.stream("POST", target, content=body, headers=headers, extensions=extensions) as answer:
                return answer.status_code
        except httpx.ConnectError:
            if address == addresses[-1]:
                raise
    raise AssertionError("a host that resolves has at least one address")


class Sender:
    """Makes the attempts that are due. It belongs to one event loop."""

    def __init__(self, jobs: AsyncJobs, settings: Settings) -> None:
        self.jobs, self.settings = jobs, settings
        self.stopping = asyncio.Event()
        # No redirects, no proxies of the environment, and no connection is kept: it would serve another name at the
        # same address. An attempt has a time limit as a whole.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        tls = ssl.create_default_context()
        self._client = httpx.AsyncClient(verify=tls, trust_env=False, timeout=None, limits=limits)
        self._lookups = ThreadPoolExecutor(LOOKUPS, "webhooks")  # which begins a thread when it needs one
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by "ID EVENT", waiting for a place or in an attempt
        self._held = Counter[Lane]()
        self._places = asyncio.Semaphore(PLACES)
        self._of_owner = WeakValueDictionary[str, asyncio.Semaphore]()  # while somebody uses one or waits for it
        self._of_lane = WeakValueDictionary[Lane, asyncio.Semaphore]()
        self._warned_at = -WARN_EVERY_S

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send meanwhile. Attempts that take longer than `END_S` at the end are made again, by another process."""
        running = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self.stopping.set()
            await running
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.idle(), END_S)
            for task in self._tasks.values():
                task.cancel()
            await self.close()

    async def close(self) -> None:
        await self._client.aclose()
        self._lookups.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while not self.stopping.is_set():
            try:
                await self.take_due()
            except RedisError as error:
                self._warn(error)
            except Exception:
                log.exception("webhooks cannot be sent for now")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), LOOK_S)

    async def idle(self) -> None:
        """Return once no message waits for a place and no attempt is in progress."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    def _warn(self, error: RedisError) -> None:
        """Log, now and then, that Redis is away or refuses a command."""
        if time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            log.warning("webhooks wait for Redis", reason=str(error))

    async def take_due(self) -> None:
        """Start a task for each message that is due and has none."""
        redis = self.jobs.redis
        due = await redis("ZRANGEBYSCORE", keys.WEBHOOKS, "-inf", await redis.now())
        new = [member for member in due if member not in self._tasks]
        ids = (member.partition(" ")[0] for member in new)
        found = await redis.ask(*(("HGET", keys.job(job_id), "record") for job_id in ids))
        held = []
        for member, raw in zip(new, found, strict=True):
            try:
                record = None if raw is None else JobRecord.read(raw)
                url = httpx.URL(record.webhook or "") if record else httpx.URL()
            except Exception as error:  # such as of a record that another version wrote, which then sends it
                log.debug("webhook left to others", member=member, reason=f"{type(error).__name__}: {error}")
                continue
            lane = (record.owner if record else "", url.netloc.decode())
            if self._held[lane] < MOST_HELD:
                self._held[lane] += 1
                self._tasks[member] = asyncio.create_task(self._wait_and_attempt(member, lane))
            else:
                held.append(member)
        if held:
            due_at = await redis.now() + HELD_S
            pairs = (part for member in held for part in (due_at, member))
            await redis("ZADD", keys.WEBHOOKS, "XX", *pairs)

    async def _wait_and_attempt(self, member: str, lane: Lane) -> None:
        of_lane = self._of_lane.setdefault(lane, asyncio.Semaphore(RECEIVER_PLACES))
        of_owner = self._of_owner.setdefault(lane[0], asyncio.Semaphore(OWNER_PLACES))
        try:
            async with of_lane, of_owner, self._places:
                if not self.stopping.is_set():
                    await self.attempt(*member.split(" ", 1))
        except RedisError as error:  # the message stays in the outbox, and is sent again even if it was delivered
            self._warn(error)
        finally:
            del self._tasks[member]
            self._held -= Counter([lane])  # drops those without messages

    async def attempt(self, job_id: str, event: str) -> None:
        """Send the message unless another process has taken it; put it off if that fails."""
        member = f"{job_id} {event}"
        try:  # before the attempt counts: Redis may be away
            job: Job | ServiceError = await self.jobs.job(job_id)
        except ServiceError as error:  # there is none to send
            job = error
        taken = await self.jobs.redis.call("take_webhook", member, LEASE_S)
        if taken is None:
            return
        number, raw = taken
        record = None if raw is None else JobRecord.read(raw)
        bind_contextvars(**(record.log_ids if record else {"job_id": job_id}), webhook_event=event, attempt=number)
        wait_s = await self._wait_after(record, job, event, number)
        await self.jobs.redis.call("end_webhook", member, number, wait_s)

    async def _wait_after(self, record: JobRecord | None, job: Job | ServiceError, event: str, number: int) -> float:
        """Make an attempt. Return the seconds until the next one, or -1 if there is none."""
        try:
            parent, job_id = (record.traceparent, record.id) if record else ("", "")
            with tracing.span("webhook", parent, {"job_id": job_id, "event": event, "attempt": number}):
                await self._send(record, job, event)
        except (ValueError, ServiceError) as error:  # ValueError: also of a name that no resolver takes
            log.warning("webhook cannot be sent", reason=str(error))
        except Exception as error:  # the network's, or what a library makes of it
            reason = str(error) or type(error).__name__
            is_gone = isinstance(error, Refused) and error.status == 410
            if number < self.settings.webhook_attempts and not is_gone:
                # Four times as long after each attempt, plus up to a quarter, so that retries spread out.
                wait_s: float = BACKOFF_S * 4 ** (number - 1) * random.uniform(1.0, 1.25)
                log.info("webhook put off", reason=reason, wait_s=round(wait_s, 1))
                return wait_s
            log.warning("webhook given up", reason=reason)
        else:
            log.info("webhook delivered")
        return -1.0

    async def _send(self, record: JobRecord | None, job: Job | ServiceError, event: str) -> None:
        """Send one message.

        ValueError or ServiceError if it can never be sent; another error if it can be retried.
        """
        if record is None or record.webhook is None or self.settings.webhook_secret is None:
            raise ValueError("the job has expired, or LABELGRID_WEBHOOK_SECRET is not set")
        if isinstance(job, ServiceError):
            raise job
        async with asyncio.timeout(self.settings.webhook_timeout_s):
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
            allow_private = self.settings.webhook_allow_private
            status = await post(self._client, record.webhook, headers, body, allow_private, self._lookups)
        if not 200 <= status < 300:
            raise Refused(status)
