"""Access control in front of every route: what is not public needs a key or, without keys, comes from this machine.

It also limits how many requests an owner sends, and how large they are. Of the routes it knows only the public ones, so
a new one is closed until it is opened here.
"""

import asyncio
import contextlib
import ipaddress
import math
import re
import time
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from service.api.access.api_keys import NOBODY, KeyRing
from service.api.problems import error_response
from service.contract.errors import CrossSite, NoKey, NotFound, NotLocal, ServiceError, TooManyRequests
from service.settings import Settings, StartError
from service.store import keys
from shared.options import LIMITS

PUBLIC = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico"})
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing
METRICS = "/metrics"  # figures only: without keys Prometheus may read them under any name of this host
COUNTED_WITHIN_S = 0.5  # Redis takes a millisecond; one that hangs must not delay what does not need it
BODY_LIMIT_BYTES = LIMITS.max_file_bytes + 65536  # of a body other than a form, such as a test file as JSON
UPLOAD_LIMIT_BYTES = (32 << 20) + 65536  # of a form, such as a zip of pictures
LARGE_BODIES = 2  # of one owner at the same time, of the largest size
CHALLENGE = 'Bearer realm="labelgrid"'
LIMIT = re.compile(r"[1-9]\d{0,9} ?(/|per) ?([1-9]\d{0,3} ?)?(second|minute|hour|day|month|year)s?", re.IGNORECASE)


@lru_cache(16)  # hosts of requests repeat
def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine itself."""
    host = host.strip("[]").lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_listening(settings: Settings, host: str) -> None:
    """Raise StartError if the API would listen on `host` for everybody, without keys."""
    if settings.has_keys or settings.allow_no_keys or is_loopback(settings.published_on or host):
        return
    raise StartError(
        f"without API keys the API listens on loopback only, not on {settings.published_on or host}: set "
        "LABELGRID_API_KEYS (python -m service keys NAME makes a key), or LABELGRID_ALLOW_NO_KEYS=1 to let everybody in"
    )


def _check_site(headers: Headers, origins: Collection[str]) -> None:
    """Raise CrossSite for a request that a browser sends for a page of another site, such as a form without preflight.

    `origins`: those whose pages may; "*" stands for all. Browsers set both headers, pages cannot, and other clients
    send neither. Without Sec-Fetch-Site, as over plain HTTP, the page's origin must be the requested host. A proxy that
    changes Host names it in X-Forwarded-Host, which a page cannot set without a preflight either.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if origin and not {origin, "*"}.isdisjoint(origins):
        return
    if site is None and origin is not None:
        hosts = {headers.get("host"), headers.get("x-forwarded-host", "").partition(",")[0].strip()}
        site = "same-origin" if origin.partition("://")[2] in hosts - {""} else "cross-site"
    if site not in (None, "same-origin", "none"):
        raise CrossSite(
            f"without API keys pages of other sites, such as {origin or site}, may not use the service, unless "
            "LABELGRID_CORS_ORIGINS names them"
        )


def read_limit(limit: str) -> RateLimitItem | None:
    """Parse a limit such as "3000/minute"; the text none gives None. Raises StartError."""
    if limit == "none":
        return None
    if not LIMIT.fullmatch(limit.strip()):  # `parse` would drop a second limit, and take a period of 0 for 1
        raise StartError(f"LABELGRID_RATE_LIMIT is {limit!r}; wanted one limit such as 3000/minute, or none")
    return parse(limit)


class RateLimiter:
    """Counts the requests of each owner in Redis over a sliding window, for all API processes together."""

    def __init__(self, connection: Redis, limit: RateLimitItem) -> None:
        self.limit = limit
        pool: Any = connection.connection_pool
        options = {"implementation": "redispy", "connection_pool": pool, "key_prefix": f"{keys.PREFIX}:rate"}
        self._limiter = SlidingWindowCounterRateLimiter(RedisStorage("async+redis://", **options))

    async def count(self, owner: str) -> None:
        """Raise TooManyRequests beyond the limit. While Redis does not answer nothing is counted: a route that needs it
        answers 503 itself.
        """
        with contextlib.suppress(RedisError, TimeoutError):
            async with asyncio.timeout(COUNTED_WITHIN_S):
                if not await self._limiter.hit(self.limit, owner):
                    stats = await self._limiter.get_window_stats(self.limit, owner)
                    wait_s = max(1, math.ceil(stats.reset_time - time.time()))
                    detail = f"more than {self.limit} with this key; nothing was done"
                    raise TooManyRequests(detail, headers={"Retry-After": str(wait_s)})


class Guard:
    """ASGI middleware: stores the owner of the request's key in its state, or answers with a problem.

    It also limits bodies, and answers HEAD as GET without the body (RFC 9110, 9.3.2).
    """

    def __init__(self, app: ASGIApp, key_ring: KeyRing, settings: Settings, origins: Collection[str]) -> None:
        """`origins`: those of other sites whose pages may use the API."""
        self.app, self.key_ring, self.settings, self.origins = app, key_ring, settings, origins
        self._held = Counter[str]()  # bytes that the requests in progress have sent, by owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"], Headers(scope=scope)
        scope.setdefault("state", {})
        try:
            if not path.isprintable():  # routes and log lines would each read it in a way of their own
                raise NotFound("nothing has an address with control characters")
            if path not in PUBLIC and not path.startswith("/static/"):
                owner = scope["state"]["owner"] = self._owner(scope, headers)
                limiter: RateLimiter | None = scope["app"].state.rate_limiter
                if owner != NOBODY:
                    bind_contextvars(owner=owner)  # in the request's log lines
                    if limiter is not None:
                        await limiter.count(owner)
        except ServiceError as error:
            await error_response(scope, error)(scope, receive, send)
            return

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body"})  # a stream ends with its headers

        is_head = scope["method"] == "HEAD"  # uvicorn sends no body
        asked = {**scope, "method": "GET"} if is_head else scope
        body = _Body(scope, headers, receive, self.settings, self._held)
        # Of safe methods no route reads a body, only whether the client leaves.
        own_receive = receive if scope["method"] in SAFE_METHODS else body.receive
        try:
            await self.app(asked, own_receive, send_headers if is_head else send)
        finally:
            body.release()
            scope["route"] = asked.get("route")  # for metrics

    def _owner(self, scope: Scope, headers: Headers) -> str:
        if not self.key_ring.enabled:
            if not self.settings.allow_no_keys and scope["path"] != METRICS:
                self._check_local(scope, headers.get("host", ""))
            is_from_page = "origin" in headers or "sec-fetch-site" in headers
            if is_from_page and scope["method"] not in SAFE_METHODS:
                _check_site(headers, self.origins)
            return NOBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise NoKey("send your API key as `Authorization: Bearer KEY`", headers={"WWW-Authenticate": CHALLENGE})
        owner = self.key_ring.owner_of(key.strip())
        if owner is None:
            challenge = f'{CHALLENGE}, error="invalid_token"'
            raise NoKey("the API key is not known", headers={"WWW-Authenticate": challenge})
        return owner

    def _check_local(self, scope: Scope, host: str) -> None:
        """Raise NotLocal for a request to another address or host name.

        The name matters because of DNS rebinding: a foreign page whose name points to loopback could otherwise use the
        service from its visitor's browser.
        """
        address, port = scope.get("server") or (None, None)  # a unix socket has no port
        if address and port is not None and not self.settings.published_on and not is_loopback(address):
            raise NotLocal("without API keys the service answers on loopback only")
        name = re.sub(r":\d*$", "", host)
        if name and not is_loopback(name):
            raise NotLocal(f"without API keys the service answers as localhost only, not as {name!r}")


class _Body:
    """The body of one request. Reading one that is too large, announced or not, raises a 413.

    Forms may have `UPLOAD_LIMIT_BYTES`, because they contain pictures; others `BODY_LIMIT_BYTES`. What the requests in
    progress of one owner have sent, `held`, may be LARGE_BODIES times as much in all; beyond it there is a 429. The
    route passes the errors on, so that they become problems as any other error.
    """

    def __init__(
        self, scope: Scope, headers: Headers, receive: Receive, settings: Settings, held: Counter[str]
    ) -> None:
        self.owner: str = scope["state"].get("owner", NOBODY)
        self.received = 0
        self._receive, self._held = receive, held
        self._is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        self._most = UPLOAD_LIMIT_BYTES if self._is_form else BODY_LIMIT_BYTES
        self._most_held = LARGE_BODIES * UPLOAD_LIMIT_BYTES
        self._announced = int(headers.get("content-length", 0))  # the HTTP server refuses other values
        self._parts = 0
        self._is_whole = False

    def release(self) -> None:
        """Count its bytes no more."""
        self._held[self.owner] -= self.received
        if not self._held[self.owner]:
            del self._held[self.owner]
        self.received = 0

    async def receive(self) -> Message:
        if self._is_form and self._is_whole:
            self.release()  # its files are read and closed, and the request waits for its job
        message = await self._receive()
        self._is_whole = not message.get("more_body", False)
        body = message.get("body", b"")
        self.received += len(body)
        self._held[self.owner] += len(body)
        if max(self.received, self._announced) > self._most:
            raise _too_large(f"the body has more than {self._most} bytes")
        if not self._is_form:
            self._parts += body.count(b"[") + body.count(b"{")
        if self._parts > LIMITS.max_parts:  # before Python creates an object for each
            raise _too_large(f"the body has more than {LIMITS.max_parts} lists and objects")
        if self._held[self.owner] > self._most_held:
            raise HTTPException(429, "your other requests are too large; try again", {"Retry-After": "1"})
        return message


def _too_large(detail: str) -> HTTPException:
    return HTTPException(413, detail, {"Connection": "close"})
