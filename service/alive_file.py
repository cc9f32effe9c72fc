"""The file LABELGRID_ALIVE_FILE, which a process touches for as long as it lives. Knows no Redis.

A supervisor that restarts workers must not depend on Redis: it would restart them all while Redis is away.
"""

import contextlib
import time
from pathlib import Path

from service.settings import SettingError, Settings

MAX_AGE_S = 30.0  # touched every second; a busy machine or a Redis that does not answer takes a few


def reset(settings: Settings) -> None:
    """Remove what an earlier process left. SettingError if the file cannot be written."""
    if (file := settings.alive_file) is None:
        return
    try:
        file.touch()
        file.unlink()
    except OSError as error:
        raise SettingError("alive_file", file, f"cannot be written: {error.strerror}") from error


def touch(settings: Settings) -> None:
    """Show that the process lives. It goes on if that fails, as on a full disk."""
    if settings.alive_file is not None:
        with contextlib.suppress(OSError):
            settings.alive_file.touch()


def is_alive(file: Path) -> bool:
    """Whether a process has touched the file lately."""
    try:
        return time.time() - file.stat().st_mtime < MAX_AGE_S
    except OSError:
        return False
