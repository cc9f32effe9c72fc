"""Connections to Redis, and what happens while it is away or refuses writes."""

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import DecorrelatedJitterBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from service.settings import StartError
from service.telemetry.logs import get_logger

log = get_logger(__name__)

OLDEST = 7  # version of Redis: the first one with functions
# A connection without an answer for so long is dead: a NAT or a balancer has forgotten it. Blocking reads take less.
SILENT_S = 5.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0  # between two attempts; random in between
WARN_EVERY_S = 10.0
OPTIONS: Any = {  # of every connection
    "protocol": 2,
    "socket_connect_timeout": 5.0,
    "decode_responses": True,
    "encoding_errors": "surrogateescape",  # so that a damaged record is read, and refused, with its job alone
}
# Both also stand inside the answer of a function or a transaction. UNBLOCKED ends a read as Redis becomes a replica.
FULL = "OOM command not allowed"
REFUSALS = ("MISCONF ", "READONLY ", "NOREPLICAS ", "UNBLOCKED ")

_best_effort = ContextVar("best_effort", default=False)


def is_full(error: Exception) -> bool:
    """Whether Redis is out of memory. The error of a transaction says so in its middle."""
    return isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and FULL in str(error))


def refuses_writes(error: Exception) -> bool:
    """Whether Redis refuses writes for now: it is full, cannot write its files, lacks replicas, or is a replica.

    A replica that is still fetching its data may refuse reads, too (`replica-serve-stale-data no`).
    """
    if is_full(error) or isinstance(error, ReadOnlyError | MasterDownError):
        return True
    return isinstance(error, ResponseError) and any(refusal in str(error) for refusal in REFUSALS)


def is_temporary(error: Exception) -> bool:
    """Whether a command may work later: Redis is away or refuses writes. A wrong password does not."""
    is_away = isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, AuthenticationError)
    return is_away or refuses_writes(error)


def concerns_all(error: Exception) -> bool:
    """Whether an error is of Redis as a whole, not of what was asked: it is away, refuses writes or the password."""
    return is_temporary(error) or isinstance(error, AuthenticationError)


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Skip the writes inside, without retries, if Redis is away or refuses them."""
    token = _best_effort.set(True)
    try:
        yield
    except RedisError as error:
        if not is_temporary(error):
            raise
    finally:
        _best_effort.reset(token)


class Once(Retry):
    """Makes one attempt. A time-out also closes the idle connections of the pool, which then are silent as well.

    `drop_idle` is a plain function, because redis-py makes deep copies.
    """

    drop_idle: Callable[[], Any]  # set by `connect`

    def __init__(self) -> None:
        super().__init__(NoBackoff(), retries=0)

    def call_with_retry(self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False) -> Any:
        try:
            return super().call_with_retry(do, fail, is_retryable, with_failure_count)
        except TimeoutError:
            self.drop_idle()
            raise


class AsyncOnce(AsyncRetry):
    """`Once` for the event loop."""

    drop_idle: Callable[[], Awaitable[Any]]  # set by `connect_async`

    def __init__(self) -> None:
        super().__init__(NoBackoff(), retries=0)

    async def call_with_retry(
        self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False
    ) -> Any:
        try:
            return await super().call_with_retry(do, fail, is_retryable, with_failure_count)
        except TimeoutError:
            await self.drop_idle()
            raise


class RetryUntilStopped(Once):
    """Retries a command until Redis takes it or `stopping` is true. A wrong password is never retried.

    Redis may then carry out a command twice. `stopping` is a plain function, as `drop_idle` is.
    """

    def __init__(self, stopping: Callable[[], bool]) -> None:
        super().__init__()
        self._backoff, self._retries = DecorrelatedJitterBackoff(cap=LONGEST_WAIT_S, base=FIRST_WAIT_S), -1
        self._supported_errors = ConnectionError, TimeoutError, ResponseError
        self.stopping = stopping
        self._warned_at = -WARN_EVERY_S

    def call_with_retry(self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False) -> Any:
        def again(error: Exception) -> bool:
            if not is_temporary(error) or _best_effort.get() or self.stopping():
                return False
            if isinstance(error, TimeoutError):
                self.drop_idle()
            if time.monotonic() - self._warned_at > WARN_EVERY_S:
                self._warned_at = time.monotonic()
                log.warning("Redis is away or refuses writes; retrying", reason=str(error))
            return is_retryable is None or bool(is_retryable(error))

        return super().call_with_retry(do, fail, again, with_failure_count)


def check_version(url: str) -> None:
    """StartError if the server lacks functions. One that is away is not checked: processes start without Redis."""
    with contextlib.suppress(RedisError), connect(url) as connection:
        version = str(connection.info("server")["redis_version"])  # Valkey gives the one that it is compatible with
        if int(version.partition(".")[0]) < OLDEST:
            raise StartError(
                f"the server at LABELGRID_REDIS_URL (or REDIS_URL) is Redis {version}: upgrade it to Redis {OLDEST} or "
                "later, or to Valkey; or unset the variable, then `labelgrid serve` starts a server of its own"
            )


def connect(url: str, *, timeout_s: float = SILENT_S, retry: Once | None = None, decodes: bool = True) -> Redis:
    """Open a connection pool. Without `retry` a command fails at once when Redis does not answer.

    `decodes`: answers are text, not bytes.
    """
    retry = retry or Once()
    client = Redis.from_url(url, socket_timeout=timeout_s, retry=retry, **{**OPTIONS, "decode_responses": decodes})
    retry.drop_idle = lambda: client.connection_pool.disconnect(inuse_connections=False)
    return client


def connect_async(url: str, *, timeout_s: float = SILENT_S, max_connections: int) -> AsyncRedis:
    """Open a pool for the event loop. A command fails at once when Redis does not answer."""
    retry = AsyncOnce()
    client = AsyncRedis.from_url(url, socket_timeout=timeout_s, max_connections=max_connections, retry=retry, **OPTIONS)
    retry.drop_idle = lambda: client.connection_pool.disconnect(inuse_connections=False)
    return client
