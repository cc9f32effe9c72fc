"""Clients over HTTP, cheap since they share the cores with the server: each has one connection and one open request."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, RemoteDisconnected
from typing import Any

Body = Mapping[str, Any]


def generate(connection: HTTPConnection, body: Body, headers: Mapping[str, str], status: int = 200) -> bytes:
    """Send a request and return what it is answered with. RuntimeError for another status."""
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != status:
        raise RuntimeError(f"POST /generate returned {answer.status}: {content[:300]!r}")
    return content


def send_all(
    port: int, bodies: Iterable[Body], clients: int, ask: Callable[[HTTPConnection, Body], object],
    at: Sequence[float] = (),
) -> list[float]:  # fmt: skip
    """Let `clients` send the requests, each the next one after its answer. Return the latencies, in s.

    With `at`, a request is not sent before its time, in s from the start, and its latency counts from then.
    """
    waiting, lock, latencies = iter(enumerate(bodies)), threading.Lock(), list[float]()
    begun = time.perf_counter()

    def client(_: int) -> None:
        connection = HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                number, body = next(waiting, (0, None))
            if body is None:
                return connection.close()
            due = begun + at[number] if at else time.perf_counter()
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                ask(connection, body)
            except (BrokenPipeError, ConnectionResetError, RemoteDisconnected):
                connection.close()  # the server closed it: this client had no turn for seconds, as on a busy machine
                ask(connection, body)
            latencies.append(time.perf_counter() - due)

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return latencies


def for_seconds(
    span_s: float, body: Callable[[int], Body], now: Callable[[], float] = time.monotonic
) -> Iterator[Body]:
    """Yield `body(0)`, `body(1)`, ... until `span_s` has passed since the first."""
    end, number = now() + span_s, 0
    while now() < end:
        yield body(number)
        number += 1
