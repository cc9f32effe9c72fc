"""What workers do while Redis is away or full: ask again, with back-off, until it is well or they are to stop.

redis-py's `from_url` on its own tries nothing again: a worker then ends when Redis restarts, and loads its models anew.
So it would on a full Redis, which refuses RQ's notes and lets jobs come to their end (`jobs.py`).
"""

import time
from collections.abc import Callable
from typing import Any

from redis.backoff import DecorrelatedJitterBackoff
from redis.exceptions import AuthenticationError, ConnectionError, OutOfMemoryError, TimeoutError
from redis.retry import Retry

from service.logs import get_logger

log = get_logger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0  # between two tries; random in between
SAY_EVERY_S = 10.0


class RideOut(Retry):
    """Tries again what Redis did not answer or had no room for, while `stopping` is false; a wrong password, never.

    A command may then have been carried out twice. `stopping` is a plain function: redis-py makes deep copies.
    """

    def __init__(self, stopping: Callable[[], bool]) -> None:
        backoff = DecorrelatedJitterBackoff(cap=LONGEST_WAIT_S, base=FIRST_WAIT_S)
        super().__init__(backoff, retries=-1, supported_errors=(ConnectionError, TimeoutError, OutOfMemoryError))
        self.stopping = stopping
        self._said_at = -SAY_EVERY_S

    def call_with_retry(self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False) -> Any:
        def again(error: Exception) -> bool:
            if self.stopping() or isinstance(error, AuthenticationError):
                return False
            if time.monotonic() - self._said_at > SAY_EVERY_S:
                self._said_at = time.monotonic()
                log.warning("Redis is away or full; trying again", reason=str(error))
            return is_retryable is None or bool(is_retryable(error))

        return super().call_with_retry(do, fail, again, with_failure_count)
