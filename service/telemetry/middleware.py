"""ASGI middleware that gives every request an id, a log line and metrics."""

import re
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from service.contract.records import trace_id
from service.telemetry import tracing
from service.telemetry.logs import REQUEST_ID, get_logger
from service.telemetry.metrics import REQUEST_SECONDS, REQUESTS, REQUESTS_IN_WORK

GIVEN_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # that a client may send
SHOWN = 200  # characters of a path
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUIET_PATHS = ("/healthz", "/readyz", "/metrics", "/static/", "/favicon.ico")  # requested all the time: logged as debug


class ObserveRequests:
    """Outermost middleware: sets the request's id, and logs, counts and times the request.

    The id is the client's `X-Request-ID` if that is valid, else a new one; the response carries it too. Metrics are by
    method and route, because paths contain ids without limit.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.log = app, get_logger(__name__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        this_id = _set_id(scope)
        method = scope["method"] if scope["method"] in METHODS else "other"
        begun, status = time.perf_counter(), 499  # if the client leaves before the response starts

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = this_id
                REQUEST_SECONDS.labels(method, _route(scope)).observe(time.perf_counter() - begun)
            await send(message)

        try:
            with REQUESTS_IN_WORK.track_inprogress():
                await self.app(scope, receive, observed_send)
        except Exception:
            status = 500  # an outer layer sends the response
            raise
        finally:
            REQUESTS.labels(method, _route(scope), str(status)).inc()
            self._log(scope, status, time.perf_counter() - begun)

    def _log(self, scope: Scope, status: int, duration_s: float) -> None:
        say = self.log.debug if scope["path"].startswith(QUIET_PATHS) else self.log.info
        owner = scope.get("state", {}).get("owner") or None
        say(
            "request",
            method=scope["method"],
            path=scope["path"][:SHOWN],  # without the query, in which somebody may have put an API key
            status=status,
            duration_ms=round(1000 * duration_s, 1),
            **({"owner": owner} if owner else {}),
        )


def _set_id(scope: Scope) -> str:
    """Bind the request's id to all log lines and to its span, and return it."""
    given = Headers(scope=scope).get(REQUEST_ID, "")
    this_id = given if GIVEN_ID.fullmatch(given) else uuid4().hex
    clear_contextvars()
    bind_contextvars(request_id=this_id)
    if parent := tracing.traceparent():
        bind_contextvars(trace_id=trace_id(parent))
        query = {"url.query": "REDACTED"} if scope["query_string"] else {}  # see `path` above
        tracing.describe({"labelgrid.request_id": this_id, **query})
    return this_id


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "other"))
