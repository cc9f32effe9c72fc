"""Requests and receivers that are meant to harm."""

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from faults.harness import Stack, expect, until
from faults.trial import BODIES, LARGE, SMALL, Trial
from service.store import keys
from tests.service.api.uploads.zips import chunk, png, with_chunks, zipped

ROOM, TOGETHER, LISTS = 400, 12, [["red cube"]] * 100
CROWDED = {"LABELGRID_MAX_QUEUED_PICTURES": str(ROOM)}
BOMBS, CHUNKS = 8, 1 << 20
TARPIT_S, MESSAGES, SLOTS = 5, 20, 8
HOOKS = {
    "LABELGRID_WEBHOOK_SECRET": "secret" * 8,
    "LABELGRID_WEBHOOK_ALLOW_PRIVATE": "true",
    "LABELGRID_WEBHOOK_TIMEOUT_S": str(TARPIT_S),
    "LABELGRID_WEBHOOK_ATTEMPTS": "1",
}
BESIDE_S = 10.0  # the longest that others may wait meanwhile


def oversize_requests_at_once(trial: Trial) -> None:
    """twelve requests of 100 pictures at once, with `max_queued_pictures` = 400: what fits is accepted"""
    trial.begin()
    connection, digest = trial.stack.connection, trial.stack.digest

    def send(number: int) -> httpx.Response:
        body = {"labels": LISTS, "steps": 1, "seed": number}
        return httpx.post(f"{trial.stack.address}/generate", json=body, headers={"Prefer": "respond-async"}, timeout=60)

    def pour() -> None:
        with ThreadPoolExecutor(TOGETHER) as threads:
            answers = list(threads.map(send, range(TOGETHER)))
        pending = sum(int(n) for n in connection.hvals(keys.waiting(digest)))
        queued = pending + connection.xlen(keys.pictures(digest))
        accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
        trial.must_finish(*accepted)
        refused = sum(answer.status_code == 429 and int(answer.headers["retry-after"]) > 0 for answer in answers)
        if not accepted or not refused or len(accepted) + refused != TOGETHER or queued > ROOM:
            raise RuntimeError(f"{len(accepted)} accepted, {refused} refused of {TOGETHER}; {queued} queued")

    trial.strike(pour)
    trial.recover()


def _bomb() -> bytes:
    """Return a PNG with a million empty chunks."""
    return with_chunks(png(), chunk(b"teSt") * CHUNKS)


def chunk_bombs(trial: Trial) -> None:
    """PNGs with a million empty chunks, also in small zips: all are refused, and others wait no longer than 10 s"""
    bomb = _bomb()
    forms: list[tuple[str, dict[str, Any]]] = [
        ("/generate/png", {"file": ("bomb.png", bomb, "image/png")}),
        ("/score", {"file": ("test.json", '[["red cube"]]'), "pictures": ("bomb.zip", zipped({"0.png": bomb}))}),
    ]

    def send(number: int) -> httpx.Response:
        path, files = forms[number % len(forms)]
        return httpx.post(trial.stack.address + path, files=files, timeout=120)

    def pour() -> None:
        waits = []
        with ThreadPoolExecutor(BOMBS) as threads:
            sent = [threads.submit(send, number) for number in range(BOMBS)]
            while not all(one.done() for one in sent):
                begun = time.monotonic()
                trial.submit(SMALL)
                waits.append(time.monotonic() - begun)
        answers = [one.result() for one in sent]
        if [answer.status_code for answer in answers] != [422] * BOMBS:
            raise RuntimeError(f"the bombs got {[answer.text[:200] for answer in answers]}")
        _check_waits(*waits)

    trial.begin()
    trial.strike(pour)
    trial.end()
    trial.recover()


def _check_waits(*waits: float) -> None:
    if max(waits) > BESIDE_S:
        raise RuntimeError(f"others waited too long: {waits}")


class _Tarpit(socketserver.BaseRequestHandler):
    """Answers one byte a second."""

    def handle(self) -> None:
        self.server.taken.append(time.monotonic())  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000:
                self.request.sendall(bytes([byte]))
                time.sleep(1.0)


class _Good(socketserver.BaseRequestHandler):
    """Answers at once."""

    def handle(self) -> None:
        self.request.recv(1 << 16)
        self.server.taken.append(time.monotonic())  # type: ignore[attr-defined]
        self.request.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")


class _Receiver(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.taken: list[float] = []  # when connections came
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


@contextlib.contextmanager
def receivers(stack: Stack) -> Iterator[tuple[_Receiver, _Receiver]]:
    """Run a receiver that is a tarpit, and a good one."""
    with _Receiver(_Tarpit) as tarpit, _Receiver(_Good) as good:
        yield tarpit, good
        tarpit.shutdown()
        good.shutdown()


def tarpit_webhooks(trial: Trial) -> None:
    """twenty webhooks to a receiver that answers a byte a second: another one gets its message meanwhile"""
    tarpit, good = trial.stack.beside
    trial.begin()

    def submit(receiver: _Receiver) -> str:
        body = {**BODIES[SMALL], "webhook": receiver.address}
        job_id: str = trial.post(body, Prefer="respond-async")["id"]
        trial.must_finish(job_id)
        return job_id

    def flood() -> None:
        for _ in range(MESSAGES):
            submit(tarpit)
        until(lambda: len(tarpit.taken) >= SLOTS, "the tarpit to have all slots of its receiver")
        job_id = submit(good)
        trial.wait([job_id])
        ended_at = time.monotonic()
        until(lambda: good.taken, "the message to the other receiver")
        _check_waits(good.taken[0] - ended_at)

    trial.strike(flood)
    trial.end()
    trial.recover()
    until(lambda: trial.stack.connection.zcard(keys.WEBHOOKS) == 0, "the messages to the tarpit to be given up")
    if len(tarpit.taken) != MESSAGES:
        raise RuntimeError(f"the tarpit got {len(tarpit.taken)} of {MESSAGES} messages")


def large_job_beside_others(trial: Trial) -> None:
    """one worker has a job of 1,280 pictures: another model's job, and uploaded pictures, wait no longer than 10 s"""
    trial.submit(*LARGE)
    lists = json.dumps([["red cube"], ["blue sphere", "gray cube"]] * 32)
    asked: Any = {"files": {"file": ("test.json", lists)}, "data": {"repeats": 20, "steps": 20}}
    address, large = f"{trial.stack.address}/score", ""

    def measure(**request: Any) -> float:
        begun = time.monotonic()
        answer = expect(httpx.post(timeout=120, **request), 200)
        trial.must_finish(answer.json()["id"])
        return time.monotonic() - begun

    def fill() -> None:
        nonlocal large
        answer = httpx.post(address, **asked, headers={"Prefer": "respond-async"}, timeout=30)
        large = answer.raise_for_status().json()["id"]
        trial.must_finish(large)
        until(lambda: trial.stack.connection.exists(keys.verdicts(large)), "its first picture")
        other = {"url": f"{trial.stack.address}/generate", "json": {**BODIES[SMALL], "model": "other"}}
        packed = zipped({"0.png": trial.undisturbed[SMALL].pictures[0]})
        files = {"file": ("test.json", '[["red cube"]]'), "pictures": ("one.zip", packed)}
        waits = measure(**other), measure(url=address, files=files)
        if not trial.is_open(large):
            raise RuntimeError("the large job ended before: the trial shows nothing")
        _check_waits(*waits)

    trial.begin()
    trial.strike(fill)
    trial.end()
    trial.recover()
