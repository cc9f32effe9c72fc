"""How a process of the service begins: settings, logs, traces, and a Redis that is new enough."""

import os

from service.settings import Settings, read_settings, unknown_variables
from service.store.connection import check_version
from service.telemetry import logs, tracing
from service.telemetry.logs import get_logger

log = get_logger(__name__)


def read(role: str) -> Settings:
    """Read the settings and start logs, whose lines name the `role`. SettingError."""
    settings = read_settings()
    logs.configure(settings, role)
    return settings


def warn_of_unknown() -> None:
    """Warn of variables that nothing reads, and remove them, so that no child process warns again."""
    if unknown := unknown_variables():
        names = [f"{name} (did you mean {nearest}?)" if nearest else name for name, nearest in unknown.items()]
        log.warning("no setting has this name", variables=", ".join(names))
        for name in unknown:
            del os.environ[name]


def read_to_serve(role: str) -> Settings:
    """Begin a process that serves: as `read`, with traces. SettingError, and StartError if Redis is too old."""
    settings = read(role)
    warn_of_unknown()
    tracing.start(settings, role)
    check_version(settings.redis_url)
    return settings
