"""The file by which a supervisor sees that a process lives, and the check that reads it."""

import os
import sys
import time
from pathlib import Path

import pytest

from service import alive_file
from service.__main__ import main
from service.settings import SettingError, Settings


def checked(monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    """Return the exit status of `python -m service check`, with a Redis that is away."""
    monkeypatch.setenv("LABELGRID_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr(sys, "argv", ["service", "check", *options])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_liveness_needs_the_file_but_no_redis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    monkeypatch.setenv("LABELGRID_ALIVE_FILE", str(file))
    settings = Settings()
    assert checked(monkeypatch, "--liveness") == 1
    alive_file.touch(settings)
    assert checked(monkeypatch, "--liveness") == 0
    assert checked(monkeypatch) == 1
    before = time.time() - alive_file.MAX_AGE_S - 1
    os.utime(file, (before, before))
    assert checked(monkeypatch, "--liveness") == 1
    alive_file.touch(settings)
    alive_file.reset(settings)  # after a restart in the same container
    assert checked(monkeypatch, "--liveness") == 1


def test_liveness_without_a_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(monkeypatch, "--liveness") == 1
    assert capsys.readouterr().err.startswith("labelgrid: LABELGRID_ALIVE_FILE=None: set it")


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"LABELGRID_ALIVE_FILE=.*: cannot be written"):
        alive_file.reset(Settings(alive_file=tmp_path / "absent" / "alive"))
    alive_file.touch(Settings(alive_file=tmp_path / "absent" / "alive"))  # later it is no reason to end
