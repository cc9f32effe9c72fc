"""Logs: one line per event on standard error, with the ids of its request and job. Knows no torch.

Use `log = get_logger(__name__)`, then `log.info("job accepted", pictures=8)`: fixed words for the event, keys for what
varies. Lines go through the standard library's logging, as those of other libraries do.
"""

import logging
import re
import sys
import time
from typing import Any
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars, merge_contextvars
from structlog.stdlib import BoundLogger, ExtraAdder, ProcessorFormatter

from service.contract.records import trace_id
from service.settings import Settings
from service.telemetry import tracing

REQUEST_ID = "X-Request-ID"
GIVEN_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # that a client may send
QUIET_PATHS = ("/healthz", "/readyz", "/metrics", "/static/", "/favicon.ico")  # requested all the time: logged as debug
OURS = ("service", "shared")  # the level applies to these only: others could log secrets, such as headers
CREDENTIALS = re.compile(r"(://[^\s/@:]*:)[^\s@]+@|((?:bearer|basic)\s+)[^\s\"',]+", re.IGNORECASE)

structlog.configure(
    processors=[structlog.stdlib.render_to_log_kwargs],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=BoundLogger,
    cache_logger_on_first_use=True,
)


def get_logger(name: str) -> BoundLogger:
    log: BoundLogger = structlog.stdlib.get_logger(name)
    return log


def request_id() -> str:
    """Return the id of the current request; "" outside of one."""
    return str(get_contextvars().get("request_id", ""))


def formatter(settings: Settings, role: str) -> logging.Formatter:
    """Build the formatter of log lines; `role`: the kind of process that writes them."""
    secret = settings.webhook_secret.get_secret_value() if settings.webhook_secret else ""

    def name_role(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, "role": role}

    def redact(logger: Any, method: str, line: Any) -> Any:
        """Remove secrets as a last resort: an error's text may contain a URL with a password."""
        line = CREDENTIALS.sub(lambda match: f"{match[1]}***@" if match[1] else f"{match[2]}***", line)
        return line.replace(secret, "***") if secret else line

    # Plain tracebacks, because rich ones show local variables and the secrets in them.
    plain = structlog.dev.plain_traceback
    rendering: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
        if settings.log_format == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    )
    return ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            ExtraAdder(),
            merge_contextvars,
            name_role,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[ProcessorFormatter.remove_processors_meta, *rendering, redact],
    )


def configure(settings: Settings, role: str) -> None:
    """Send all logs of this process to standard error. Call it once, at the entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(settings, role))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())


class RequestLog:
    """Outermost ASGI middleware: gives every request an id, and logs a line after its response.

    The id is the client's `X-Request-ID` if that is valid, else a new one; the response carries it too.
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
            query = {"url.query": "REDACTED"} if scope["query_string"] else {}  # see `path` below
            tracing.describe({"labelgrid.request_id": this_id, **query})
        begun, status = time.perf_counter(), 499  # if the client leaves before the response starts

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = this_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            status = 500  # an outer layer sends the response
            raise
        finally:
            say = self.log.debug if scope["path"].startswith(QUIET_PATHS) else self.log.info
            owner = scope.get("state", {}).get("owner") or None
            say(
                "request",
                method=scope["method"],
                path=scope["path"],  # without the query, in which somebody may have put an API key
                status=status,
                duration_ms=round(1000 * (time.perf_counter() - begun), 1),
                **({"owner": owner} if owner else {}),
            )
