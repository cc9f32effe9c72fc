"""The log of this process, as the tests of logs, requests and traces read it."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr
from structlog.contextvars import clear_contextvars

from service.settings import Settings
from service.telemetry.logs import LineFormatter
from tests.service.processes import until

SECRET = "a secret that is long enough"
ASYNC = {"prefer": "respond-async"}


class Lines(io.StringIO):
    """The log so far, parsed as JSON."""

    def read_all(self, **wanted: Any) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.getvalue().splitlines()]
        return [line for line in lines if wanted.items() <= line.items()]

    def wait(self, count: int, **wanted: Any) -> list[dict[str, Any]]:
        """Wait for `count` matching lines: an event may be visible before its line is written."""
        until(lambda: len(self.read_all(**wanted)) >= count)
        return self.read_all(**wanted)


@pytest.fixture
def lines(settings: Settings) -> Iterator[Lines]:
    """The lines of this process, formatted as by an entry point."""
    stream = Lines()
    handler = logging.StreamHandler(stream)
    json_lines = settings.model_copy(update={"log_format": "json", "webhook_secret": SecretStr(SECRET)})
    handler.setFormatter(LineFormatter(json_lines, "test"))
    root, ours = logging.getLogger(), logging.getLogger("service")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    clear_contextvars()
    yield stream
    ours.setLevel(level)
    root.removeHandler(handler)
