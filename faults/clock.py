"""Clocks that jump: libfaketime changes a process's wall clock and leaves its monotonic clock alone."""

import shlex
from pathlib import Path


class NoLibfaketime(RuntimeError):
    """libfaketime is not installed."""


def environment(clock: Path) -> dict[str, str]:
    """Return variables for a process whose wall clock follows the file `clock`, read once a second. NoLibfaketime."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        raise NoLibfaketime("libfaketime is not installed; `sh faults/setup.sh` installs Debian's")
    jump(clock, 0)
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def jump(clock: Path, seconds: int) -> None:
    """Set the clock's offset from the system's."""
    clock.write_text(f"{seconds:+d}\n")


def command(clock: Path, binary: Path) -> Path:
    """Write a script beside `clock` that runs `binary` with that clock, and return it."""
    script = clock.with_suffix(".sh")
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(clock).items())
    script.write_text(f'#!/bin/sh\nexec env {variables} {shlex.quote(str(binary))} "$@"\n')
    script.chmod(0o700)
    return script
