"""Logs: one line per event on standard error, with the ids of its request and job. Knows no torch.

Use `log = get_logger(__name__)`, then `log.info("draining", requests=8)`: fixed words for the event, keys for what
varies. Lines go through the standard library's logging, as those of other libraries do.
"""

import logging
import re
import sys
from typing import Any

import structlog
from structlog.contextvars import get_contextvars, merge_contextvars
from structlog.stdlib import BoundLogger, ExtraAdder, ProcessorFormatter

from service.settings import Settings

REQUEST_ID = "X-Request-ID"
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
