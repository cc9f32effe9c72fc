"""Access control in front of every route: what is not public needs a key or, without keys, comes from this machine.

Of the routes it knows only the public ones, so a new one is closed until it is opened here. A route that takes more CPU
time than others charges for it itself (`charge`).
"""

import asyncio
import functools
import ipaddress
import re
from collections.abc import Collection

from fastapi import FastAPI
from redis.exceptions import RedisError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.access.keys import NOBODY, KeyRing
from service.api.access.rate_limit import RateLimiter
from service.api.problems import SAFE_METHODS, error_response
from service.contract.errors import CrossSite, NoKey, NotFound, NotLocal, ServiceError, TooManyRequests
from service.settings import Settings, StartError

PUBLIC = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico"})
METRICS = "/metrics"  # figures only: without keys Prometheus may read them under any name of this host
COUNTED_WITHIN_S = 0.5  # Redis takes a millisecond; one that hangs must not delay what does not need it
CHALLENGE = 'Bearer realm="labelgrid"'


class Exposed(StartError):
    """The API would be open to everybody who can reach this machine."""


@functools.lru_cache(maxsize=64)  # nearly all requests have the same
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
    """Raise Exposed if the API would listen on `host` for everybody, without keys."""
    if settings.has_keys or settings.allow_no_keys or is_loopback(settings.published_on or host):
        return
    raise Exposed(
        f"without API keys the API listens on loopback only, not on {settings.published_on or host}: set "
        "LABELGRID_API_KEYS (python -m service keys NAME makes a key), or LABELGRID_ALLOW_NO_KEYS=1 to let everybody in"
    )


def is_public(path: str) -> bool:
    return path in PUBLIC or path.startswith("/static/")


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


async def _check_rate(app: FastAPI, owner: str, cost: int, counted: int = 0) -> None:
    """Count a request as `cost` of them, of which `counted` are counted already. Raises TooManyRequests.

    While Redis does not answer nothing is counted: a route that needs it answers 503 itself.
    """
    limiter: RateLimiter | None = app.state.rate_limiter
    if limiter is None or owner == NOBODY:
        return
    try:
        async with asyncio.timeout(COUNTED_WITHIN_S):
            wait_s = await limiter.wait_s(owner, cost, counted)
    except (RedisError, TimeoutError):
        return
    if wait_s is not None:
        detail = f"more than {limiter.limit} with this key; nothing was done"
        raise TooManyRequests(detail, headers={"Retry-After": str(wait_s)})


async def charge(scope: Scope, cost: int) -> None:
    """Count a request as `cost` requests, once it is known what it takes. Raises TooManyRequests."""
    if cost > 1 and (owner := scope.get("state", {}).get("owner")):
        await _check_rate(scope["app"], owner, cost, counted=1)


class Guard:
    """ASGI middleware: stores the owner of the request's key in its state, or answers with a problem."""

    def __init__(self, app: ASGIApp, keys: KeyRing, settings: Settings, origins: Collection[str]) -> None:
        """`origins`: those of other sites whose pages may use the API."""
        self.app, self.keys, self.settings, self.origins = app, keys, settings, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            try:
                if not path.isprintable():  # routes and log lines would each read it in a way of their own
                    raise NotFound("nothing has an address with control characters")
                if not is_public(path):
                    scope.setdefault("state", {})["owner"] = owner = self._owner(scope)
                    await _check_rate(scope["app"], owner, cost=1)
            except ServiceError as error:
                await error_response(scope, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _owner(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        if not self.keys.enabled:
            if not self.settings.allow_no_keys and scope["path"] != METRICS:
                self._check_local(scope, headers.get("host", ""))
            if scope["method"] not in SAFE_METHODS:
                _check_site(headers, self.origins)
            return NOBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise NoKey("send your API key as `Authorization: Bearer KEY`", headers={"WWW-Authenticate": CHALLENGE})
        owner = self.keys.owner_of(key.strip())
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
