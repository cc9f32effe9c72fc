"""ASGI middleware that gives every request an id, a log line and metrics, and every answer its headers."""

import re
import time
from uuid import uuid4

from opentelemetry.trace import get_current_span
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from service.contract.records import trace_id
from service.telemetry import tracing
from service.telemetry.logs import REQUEST_ID, get_logger
from service.telemetry.metrics import REQUEST_SECONDS, REQUESTS, REQUESTS_IN_WORK

GIVEN_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # that a client may send
SHOWN = 200  # characters of a path
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# What browsers may do with an answer: it is no page and cannot be framed. A route that serves a page has its own.
DEFAULTS = [
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
    (b"cache-control", b"no-store"),  # jobs are private to their owners
]
QUIET_PATHS = ("/healthz", "/readyz", "/metrics", "/static/", "/favicon.ico")  # requested all the time: logged as debug


class ObserveRequests:
    """Outermost middleware: sets the request's id and the headers of every answer; logs, counts and times the request.

    The id is the client's `X-Request-ID` if that is valid, else a new one; the response carries it too. Metrics are by
    method and route, because paths contain ids without limit.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.log = app, get_logger(__name__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        this_id = given if GIVEN_ID.fullmatch(given) else uuid4().hex
        clear_contextvars()
        bind_contextvars(request_id=this_id)
        if parent := tracing.traceparent():
            bind_contextvars(trace_id=trace_id(parent))
            # Without the query, in which somebody may have put an API key.
            query = {"url.query": "REDACTED"} if scope["query_string"] else {}
            get_current_span().set_attributes({"labelgrid.request_id": this_id, **query})
        method = scope["method"] if scope["method"] in METHODS else "other"
        begun, started_after_s = time.perf_counter(), None
        status = 499  # if the client leaves before the response starts

        async def observed_send(message: Message) -> None:
            nonlocal status, started_after_s
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (REQUEST_ID.encode(), this_id.encode())]
                names = {name for name, _ in headers}
                message["headers"] = headers + [header for header in DEFAULTS if header[0] not in names]
                started_after_s = time.perf_counter() - begun
            await send(message)

        try:
            with REQUESTS_IN_WORK.track_inprogress():
                await self.app(scope, receive, observed_send)
        except Exception:
            status = 500  # an outer layer sends the response
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            REQUESTS.labels(method, route, str(status)).inc()
            if started_after_s is not None:
                REQUEST_SECONDS.labels(method, route).observe(started_after_s)
            say = self.log.debug if scope["path"].startswith(QUIET_PATHS) else self.log.info
            duration_ms = round(1000 * (time.perf_counter() - begun), 1)
            path = scope["path"][:SHOWN]
            say("request", method=scope["method"], path=path, status=status, duration_ms=duration_ms)
