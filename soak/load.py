"""A steady mixed load: each request has a client, of a kind drawn from the seed, that insists on its answer."""

import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx

from faults.cases.disconnects import RESET
from faults.cases.edits import EDITS, MODEL
from faults.checks import Fetched
from faults.harness import expect, settled, until
from faults.trial import LABELS, RETRY_S
from service.contract.records import TERMINAL
from soak.receiver import Receiver
from soak.stack import OWNERS, SoakStack
from tests.service.api.uploads.zips import GOOD, TEST_FILE, zipped

EVERY_S = 3.0  # between two requests: the soak must leave a shared machine its work
AT_A_TIME = 100  # clients; more than wait in any fault
PATIENCE_S = 630.0  # of a client: some faults and restarts on a busy machine
POLL_S = 5 * RETRY_S
DEADLINE_S = 20.0  # of a job, which a fault can make late
PATIENT = {"Prefer": "wait=20"}
ASYNC = {"Prefer": "respond-async"}


@dataclass(frozen=True)
class Body:
    """What a request asks for: JSON, or a zip of pictures to judge. `total`: its pictures."""

    path: str
    total: int
    json: Mapping[str, Any] | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


def _generate(n: int, steps: int, **options: Any) -> Body:
    labels = [LABELS[i % len(LABELS)] for i in range(n)]
    return Body("/generate", n, {"labels": labels, "steps": steps, "seed": 10 * n, **options})


BODIES = [
    _generate(1, 4),
    _generate(2, 20, sampler="ddim", eta=0.5),
    _generate(3, 12, model="other"),
    _generate(4, 30, sampler="euler"),
    _generate(5, 24, guidance=1.0, sampler="ddpm"),
    _generate(6, 20, sampler="dpmpp_2m", guidance=5.0),
    _generate(7, 16, trajectory=3),
    _generate(8, 20, model="other", sampler="ddim"),
    _generate(2, 6, until="exact", attempts=3),
    _generate(1, 8, model=MODEL),
    _generate(1, 8, model=MODEL, edits=EDITS),
    Body("/score", 6, data={"repeats": 3, "seed": 1, "steps": 6}, files={"file": ("0.json", json.dumps(LABELS[:2]))}),
    Body("/score", 3, files={"file": TEST_FILE, "pictures": ("pictures.zip", zipped(GOOD), "application/zip")}),
]
PLACED, EDITED = (i for i, body in enumerate(BODIES) if body.json and body.json.get("model") == MODEL)
KINDS = {  # of clients, with how often each comes
    "waits": 4,
    "polls": 4,
    "cancels": 2,
    "deletes": 2,
    "watches and leaves": 1,
    "asks and leaves": 1,
    "asks twice": 2,
    "wants a webhook": 2,
    "edits": 2,
    "has a deadline": 2,
}


@dataclass
class Ledger:
    """What clients were promised and what they saw."""

    jobs: dict[str, int] = field(default_factory=dict)  # id of each accepted job -> its index in BODIES
    may_be_cancelled: set[str] = field(default_factory=set)
    may_be_late: set[str] = field(default_factory=set)  # fails by its deadline
    clients: Counter[str] = field(default_factory=Counter)  # that got all that they wanted, by kind
    problems: list[str] = field(default_factory=list)
    longest_s: float = 0.0  # from a request to its accepted job
    retries: int = 0


class Load:
    """Starts clients at a steady rate. `expected`: each body's pictures without faults."""

    def __init__(self, stack: SoakStack, receiver: Receiver, seed: int) -> None:
        self.stack, self.receiver, self.dice = stack, receiver, random.Random(seed)
        self.ledger, self.expected = Ledger(), dict[int, Fetched]()
        self._lock = threading.Lock()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self.http = httpx.Client(timeout=30, limits=limits)
        self.pool = ThreadPoolExecutor(AT_A_TIME, "client")

    def learn(self) -> None:
        """Run each body once, without faults; all later pictures must equal these."""
        for number in range(len(BODIES)):
            client = Client(self, number, "red", random.Random(number))
            job = client.post(PATIENT)
            self.expected[number] = client.fetch(job)

    def run(self, seconds: float) -> None:
        """Start a client every `EVERY_S`; return when all have ended."""
        begun, count = time.monotonic(), 0
        kinds, weights = zip(*KINDS.items(), strict=True)
        while count * EVERY_S < seconds:
            (kind,) = self.dice.choices(kinds, weights)
            number, owner = self.dice.randrange(len(BODIES)), self.dice.choice(list(OWNERS))
            client = Client(self, number, owner, random.Random(self.dice.random()))
            self.pool.submit(self._serve, kind, client)
            count += 1
            time.sleep(max(0.0, begun + count * EVERY_S - time.monotonic()))
        self.pool.shutdown()

    def _serve(self, kind: str, client: "Client") -> None:
        try:
            SCRIPTS[kind](client)
        except Exception as error:  # of any kind: the soak goes on and reports it
            with self._lock:
                self.ledger.problems.append(f"a client that {kind} (body {client.number}): {error!r}")
        else:
            with self._lock:
                self.ledger.clients[kind] += 1

    def accept(self, job_id: str, number: int, after_s: float, cancelled: bool, late: bool) -> None:
        with self._lock:
            self.ledger.jobs[job_id] = number
            if late:  # its client may have waited until the queue was short enough
                self.ledger.may_be_late.add(job_id)
            else:
                self.ledger.longest_s = max(self.ledger.longest_s, after_s)
            if cancelled:
                self.ledger.may_be_cancelled.add(job_id)


class Client:
    """One request, with everything that its client does with the job."""

    def __init__(self, load: Load, number: int, owner: str, dice: random.Random) -> None:
        self.load, self.number, self.body, self.owner, self.dice = load, number, BODIES[number], owner, dice
        self.key = str(UUID(int=dice.getrandbits(128)))
        self.headers = {"Authorization": f"Bearer {OWNERS[owner]}"}

    def another(self, number: int) -> "Client":
        """Return a client of the same owner with another body."""
        return Client(self.load, number, self.owner, self.dice)

    def request(self, method: str, path: str, *statuses: int, **options: Any) -> httpx.Response:
        """Send a request to either API until it answers with neither 429 nor 503.

        NotInTime; RuntimeError for an answer of another status than 200, or than `statuses`.
        """
        headers = {**self.headers, **options.pop("headers", {})}

        def answered() -> httpx.Response | None:
            address = self.dice.choice(self.load.stack.addresses)
            answer = settled(lambda: self.load.http.request(method, address + path, headers=headers, **options))
            self.load.ledger.retries += answer is None
            return answer

        answer = until(answered, f"an answer to {method} {path}", PATIENCE_S, RETRY_S)
        return expect(answer, *statuses or (200,))

    def post(self, prefer: dict[str, str], *, cancelled: bool = False, late: bool = False, **more: Any) -> str:
        """Send the request until it is accepted, and return the job's id. RuntimeError for any other answer."""
        begun = time.monotonic()
        headers = {**prefer, "Idempotency-Key": self.key}
        if self.body.json is not None:
            content: dict[str, Any] = {"json": {**self.body.json, **more}}
        else:
            content = {"files": self.body.files, "data": {**self.body.data, **more}}
        job: dict[str, Any] = self.request("POST", self.body.path, 200, 202, headers=headers, **content).json()
        self.load.accept(job["id"], self.number, time.monotonic() - begun, cancelled, late)
        return str(job["id"])

    def edit(self, job_id: str) -> str:
        """Send an edit of a job's picture until it is accepted, and return its job's id, which is one of this body."""
        path, headers, begun = f"/jobs/{job_id}/images/0/edit", {**ASYNC, "Idempotency-Key": self.key}, time.monotonic()
        job: dict[str, Any] = self.request("POST", path, 200, 202, headers=headers, json={"edits": EDITS}).json()
        self.load.accept(job["id"], self.number, time.monotonic() - begun, cancelled=False, late=False)
        return str(job["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.request("GET", f"/jobs/{job_id}").json()
        return found

    def ended(self, job_id: str) -> dict[str, Any]:
        """Wait for the job's end by polling, and return it."""

        def ended() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in TERMINAL else None

        return until(ended, f"the end of job {job_id}", PATIENCE_S, POLL_S)

    def fetch(self, job_id: str) -> Fetched:
        """Wait for the job's end, and return its pictures and grid. RuntimeError if it did not finish."""
        job = self.ended(job_id)
        if job["status"] != "finished":
            raise RuntimeError(f"job {job_id} is {job['status']}: {job['error']}")
        names = [*(f"images/{i}.png" for i in range(self.body.total)), "grid.png"]
        *pictures, grid = [self.request("GET", f"/jobs/{job_id}/{name}").content for name in names]
        return Fetched(pictures, grid)

    def check(self, job_id: str) -> None:
        """Wait for the job's end and check its pictures. RuntimeError."""
        if self.fetch(job_id) != self.load.expected[self.number]:
            raise RuntimeError(f"pictures of job {job_id} differ from those without faults")


def waits(client: Client) -> None:
    client.check(client.post(PATIENT))


def polls(client: Client) -> None:
    client.check(client.post(ASYNC))


def cancels(client: Client) -> None:
    """A retried request may find the job cancelled by the first one: both answers are right."""
    job_id = client.post(ASYNC, cancelled=True)
    time.sleep(client.dice.uniform(0, 0.5))
    client.request("POST", f"/jobs/{job_id}/cancel", 200, 409)
    if (status := client.job(job_id)["status"]) not in ("cancelled", "finished"):
        raise RuntimeError(f"job {job_id} is {status} after it was cancelled")


def deletes(client: Client) -> None:
    job_id = client.post(PATIENT)
    client.check(job_id)
    client.request("DELETE", f"/jobs/{job_id}", 200, 404)
    client.request("GET", f"/jobs/{job_id}/grid.png", 404, 410)


def _open(client: Client, request: str) -> socket.socket:
    port = client.dice.choice((client.load.stack.port, client.load.stack.spare_port))
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    headers = "".join(f"{name}: {value}\r\n" for name, value in client.headers.items())
    connection.sendall(f"{request}\r\nHost: localhost\r\n{headers}\r\n".encode())
    return connection


def watches_and_leaves(client: Client) -> None:
    job_id = client.post(ASYNC)
    with contextlib.suppress(OSError), _open(client, f"GET /jobs/{job_id}/events HTTP/1.1") as connection:
        connection.recv(4096)  # fails if that API is being restarted
        time.sleep(client.dice.uniform(0, 2))
    client.check(job_id)


def asks_and_leaves(client: Client) -> None:
    """A waiting request whose connection is lost at once; a retry has the same job."""
    if client.body.json is not None:
        with contextlib.suppress(httpx.TransportError):
            client.load.http.post(
                client.load.stack.addresses[0] + client.body.path,
                json=client.body.json,
                headers={**client.headers, "Idempotency-Key": client.key},
                timeout=client.dice.uniform(0.01, 0.3),
            )
    client.check(client.post(ASYNC))


def asks_twice(client: Client) -> None:
    """Two requests with one key at the same time."""
    found = list[str]()
    other = threading.Thread(target=lambda: found.append(client.post(ASYNC)))
    other.start()
    job_id = client.post(PATIENT)
    other.join()
    if found != [job_id]:
        raise RuntimeError(f"one Idempotency-Key created the jobs {[job_id, *found]}")
    client.check(job_id)


def wants_a_webhook(client: Client) -> None:
    job_id = client.post(ASYNC, webhook=client.load.receiver.address)
    client.check(job_id)
    message = (job_id, "job.finished")
    until(lambda: message in client.load.receiver.received, f"the webhook of job {job_id}", PATIENCE_S, POLL_S)


def edits(client: Client) -> None:
    """Has a picture drawn and edited, and deletes the first one while the other is drawn."""
    source, edited = client.another(PLACED), client.another(EDITED)
    job_id = source.post(PATIENT)
    source.check(job_id)
    edit_id = edited.edit(job_id)
    client.request("DELETE", f"/jobs/{job_id}", 200, 404)
    edited.check(edit_id)


def has_a_deadline(client: Client) -> None:
    """Insists until its deadline can be met. A fault after that may make the job late."""
    job_id = client.post(ASYNC, late=True, deadline_s=DEADLINE_S)
    if client.ended(job_id)["reason"] != "deadline":
        client.check(job_id)


SCRIPTS: dict[str, Callable[[Client], None]] = {
    "waits": waits,
    "polls": polls,
    "cancels": cancels,
    "deletes": deletes,
    "watches and leaves": watches_and_leaves,
    "asks and leaves": asks_and_leaves,
    "asks twice": asks_twice,
    "wants a webhook": wants_a_webhook,
    "edits": edits,
    "has a deadline": has_a_deadline,
}
