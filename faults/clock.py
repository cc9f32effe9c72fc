"""Clocks that jump: libfaketime between a process and the system's wall clock. Its monotonic clock goes on as it is."""

import shlex
from pathlib import Path


class NoLibfaketime(RuntimeError):
    """The library is not there."""


def environment(clock: Path) -> dict[str, str]:
    """For a process whose wall clock goes as the file `clock` says; it looks once a second. NoLibfaketime."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        raise NoLibfaketime("libfaketime is not there; `sh faults/setup.sh` installs Debian's")
    jump(clock, 0)
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def jump(clock: Path, seconds: int) -> None:
    """Sets the clock so far from the system's."""
    clock.write_text(f"{seconds:+d}\n")


def command(clock: Path, binary: Path) -> Path:
    """A file beside `clock` that runs `binary` by that clock."""
    script = clock.with_suffix(".sh")
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(clock).items())
    script.write_text(f'#!/bin/sh\nexec env {variables} {shlex.quote(str(binary))} "$@"\n')
    script.chmod(0o700)
    return script
