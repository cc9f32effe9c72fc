"""A store, and the service's command line, run in this process."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import pytest
from redis import Redis

from service.__main__ import main
from service.settings import Settings
from service.store.jobs import JobStore
from service.telemetry.logs import OURS

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def logs_restored() -> Iterator[None]:
    """Undo what `main` sets: its handler writes to the test's own standard error, which is closed at the test's end."""
    loggers = [logging.getLogger(), *map(logging.getLogger, OURS)]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def store(connection: Redis, settings: Settings) -> JobStore:
    return JobStore(connection, settings)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `python -m service ARGUMENTS` with exactly these variables; returns exit code, stdout and stderr.

    A process of its own would import for two seconds first. An exception that it would print ends the test.
    """

    def run(*arguments: str, environment: Mapping[str, str] = os.environ) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["service", *arguments])
        with mock.patch.dict(os.environ, dict(environment), clear=True):
            try:
                main()
                code: object = 0
            except SystemExit as end:
                code = end.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run
