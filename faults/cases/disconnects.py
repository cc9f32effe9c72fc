"""Clients that disconnect without closing: they reset their connections."""

import json
import socket
import struct
from typing import Any
from uuid import uuid4

from faults.harness import until
from faults.trial import BODIES, LARGE, SMALL, Trial
from service.store import keys

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 s


def _send(port: int, request: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.sendall(request.encode())
    return connection


def _watch(port: int, job_id: str) -> socket.socket:
    """Open a job's event stream and read its first event."""
    connection = _send(port, f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    received = b""
    while b"event: job" not in received:
        received += connection.recv(65536)
    return connection


def _ask(port: int, key: str) -> socket.socket:
    """Send a request for a picture, and do not wait for the response."""
    body = json.dumps(BODIES[SMALL])
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: {key}\r\nContent-Type: application/json\r\n"
    return _send(port, f"{head}Content-Length: {len(body)}\r\n\r\n{body}")


def connect_and_reset(trial: Trial, count: int) -> None:
    """Connect `count` clients that watch jobs and `count` that request pictures, then reset all connections.

    The trial checks their jobs, too.
    """
    port, idempotency_keys = trial.stack.port, [uuid4().hex for _ in range(count)]

    def open_now() -> list[str]:
        found: Any = trial.stack.connection.zrange(keys.DEADLINES, 0, -1)
        return list(found)

    open_jobs = open_now()
    connections = [_watch(port, open_jobs[i % len(open_jobs)]) for i in range(count)]
    connections += [_ask(port, key) for key in idempotency_keys]
    until(lambda: set(open_now()) - set(open_jobs), "a waiting request")
    for connection in connections:
        connection.close()
    for key in idempotency_keys:  # a retry is the only way to learn the jobs' ids
        trial.jobs[trial.post(BODIES[SMALL], key, Prefer="respond-async")["id"]] = SMALL


def watched(trial: Trial) -> bool:
    """Whether workers still render previews for anyone."""
    return next(trial.stack.connection.scan_iter("labelgrid:job:*:watched"), None) is not None


def clients_leave(trial: Trial) -> None:
    """50 clients reset their connections after a job's first event, and 50 after sending a request"""
    trial.submit(*LARGE)
    trial.begin()
    trial.strike(lambda: connect_and_reset(trial, 50))
    until(lambda: trial.stack.requests_in_work() == 1 and not watched(trial), "the API to wait for no job", 30)
    trial.recover()
