"""Logs: one line per event on standard error, with the ids of its request and job. Knows no torch.

Use `log = get_logger(__name__)`, then `log.info("draining", requests=8)`: fixed words for the event, keys for what
varies. Lines go through the standard library's logging, as those of other libraries do.
"""

import logging
import re
import sys
from typing import Any

import structlog
from structlog.contextvars import get_contextvars
from structlog.stdlib import BoundLogger

from service.settings import Settings

REQUEST_ID = "X-Request-ID"
OURS = ("service", "shared")  # the level applies to these only: others could log secrets, such as headers
OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
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


def _escape(logger: None, level: str, line: dict[str, Any]) -> dict[str, Any]:
    """Escape what a terminal would obey: values such as a path come from outside."""
    return {
        name: value.encode("unicode_escape").decode() if isinstance(value, str) and not value.isprintable() else value
        for name, value in line.items()
    }


class LineFormatter(logging.Formatter):
    """Renders a record, with the ids of its request and job, as one line without secrets.

    structlog's ProcessorFormatter copies every record and takes twice as long, a tenth of the API's CPU time.
    """

    def __init__(self, settings: Settings, role: str) -> None:
        """`role`: the kind of process that writes the lines."""
        super().__init__()
        self._role = role
        self._secret = settings.webhook_secret.get_secret_value() if settings.webhook_secret else ""
        # Plain tracebacks, because rich ones show local variables and the secrets in them.
        plain = structlog.dev.plain_traceback
        rendering: list[Any] = (
            [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
            if settings.log_format == "json"
            else [_escape, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
        )
        self._processors = (structlog.processors.TimeStamper(fmt="iso", utc=True), *rendering)

    def format(self, record: logging.LogRecord) -> str:
        line: Any = get_contextvars()
        line |= {name: value for name, value in vars(record).items() if name not in OF_EVERY_RECORD}
        line |= {"event": record.getMessage(), "level": record.levelname.lower()}
        line |= {"logger": record.name, "role": self._role}
        if record.exc_info:
            line["exc_info"] = record.exc_info
        for process in self._processors:
            line = process(None, record.levelname, line)
        return self._redact(line)

    def _redact(self, line: str) -> str:
        """Remove secrets as a last resort: an error's text may contain a URL with a password."""
        capitals = line.upper()
        if "://" in line or "BEARER" in capitals or "BASIC" in capitals:  # which is faster than the expression
            line = CREDENTIALS.sub(lambda match: f"{match[1]}***@" if match[1] else f"{match[2]}***", line)
        return line.replace(self._secret, "***") if self._secret else line


def configure(settings: Settings, role: str) -> None:
    """Send all logs of this process to standard error. Call it once, at the entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(settings, role))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging._srcfile = None  # the documented way not to look for the line of code that logs, since no line shows it
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())
