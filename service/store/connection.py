"""Connections to Redis, and what happens while it is away or takes no writes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from redis import Redis
from redis.backoff import DecorrelatedJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from service.telemetry.logs import get_logger

log = get_logger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0  # between two tries; random in between
SAY_EVERY_S = 10.0
# Also within what a script or a transaction answers. Who waits in a Redis that becomes a replica is UNBLOCKED.
REFUSALS = ("OOM command not allowed", "MISCONF ", "READONLY ", "NOREPLICAS ", "UNBLOCKED ")

_best_effort = ContextVar("best_effort", default=False)


def refuses_writes(error: Exception) -> bool:
    """Whether Redis takes no writes for now: full, unable to write its files, without replicas, or itself one since."""
    if isinstance(error, OutOfMemoryError | ReadOnlyError):
        return True
    return isinstance(error, ResponseError) and any(refusal in str(error) for refusal in REFUSALS)


def _may_pass(error: Exception) -> bool:
    is_away = isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, AuthenticationError)
    return is_away or refuses_writes(error)


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """What is to be written within is not worth a wait: where Redis is away or takes no writes, it is left out."""
    token = _best_effort.set(True)
    try:
        yield
    except RedisError as error:
        if not _may_pass(error):
            raise
    finally:
        _best_effort.reset(token)


class RetryUntilStopped(Retry):
    """Tries again what Redis did not answer or write, while `stopping` is false; never for a wrong password.

    A command may then have been carried out twice. `stopping` is a plain function: redis-py makes deep copies.
    """

    def __init__(self, stopping: Callable[[], bool]) -> None:
        backoff = DecorrelatedJitterBackoff(cap=LONGEST_WAIT_S, base=FIRST_WAIT_S)
        super().__init__(backoff, retries=-1, supported_errors=(ConnectionError, TimeoutError, ResponseError))
        self.stopping = stopping
        self._said_at = -SAY_EVERY_S

    def call_with_retry(self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False) -> Any:
        def again(error: Exception) -> bool:
            if not _may_pass(error) or _best_effort.get() or self.stopping():
                return False
            if time.monotonic() - self._said_at > SAY_EVERY_S:
                self._said_at = time.monotonic()
                log.warning("Redis is away or full; trying again", reason=str(error))
            return is_retryable is None or bool(is_retryable(error))

        return super().call_with_retry(do, fail, again, with_failure_count)


def text(raw: bytes | str) -> str:
    """What Redis sent, as text. Connections here give bytes, for the pictures; redis-py's types allow for both."""
    return raw.decode() if isinstance(raw, bytes) else raw


def entries_of(answer: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The entries in the answer to a read of streams, [(stream, entries), ...] or None, as protocol 2 has it."""
    return [entry for _, entries in answer or [] for entry in entries]


def connect(url: str, *, timeout_s: float = 15.0, retry: Retry | None = None) -> Redis:
    """A connection pool whose socket timeout leaves room for blocking reads of up to 10 s.

    Without `retry` what Redis does not answer is an error at once.
    """
    return Redis.from_url(
        url, protocol=2, socket_timeout=timeout_s, socket_connect_timeout=5.0, health_check_interval=30, retry=retry
    )
