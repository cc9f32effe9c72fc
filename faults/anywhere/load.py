"""The service that the sweep runs, and the fixed load of each trial, whose jobs must all end."""

import contextlib
import http.server
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import httpx

from faults import checks, history
from faults.anywhere.orders import OrderBook, Recording
from faults.anywhere.process import FOLDER, VICTIMS, ForkServer
from faults.harness import NotInTime, Stack, until
from service.api.access.api_keys import hash_of, new_key
from service.contract.records import TERMINAL
from service.local.supervisor import Child
from service.store import keys
from service.store.workers import list_live
from shared.checkpoint import read_info
from shared.registry import resolve
from tests.service.api.uploads.zips import png, zipped

WITHIN_S = 15.0  # for everything but the victim, and for a new job; a busy machine needs more
WORKERS = 1  # with more, which one reaches a place would be chance
OWNERS = {name: new_key() for name in ("owner-a", "owner-b")}
ENVIRONMENT = {
    "LABELGRID_API_KEYS": " ".join(f"{name}:{hash_of(key)}" for name, key in OWNERS.items()),
    "LABELGRID_RATE_LIMIT": "1000000/minute",
    "LABELGRID_WEBHOOK_SECRET": "anywhere" * 4,
    "LABELGRID_WEBHOOK_ALLOW_PRIVATE": "1",
    "LABELGRID_WEBHOOK_TIMEOUT_S": "2",
    "LABELGRID_LEASE_S": "3",
    "LABELGRID_JOB_TIMEOUT_S": "120",
    "LABELGRID_DRAIN_S": "4",
    "LABELGRID_ENGINE": "torch",
}
VICTIM, BYSTANDER, OTHER_OWNER, OTHER_MODEL, UPLOAD, CANCELLED = (
    "victim", "bystander", "other owner", "other model", "upload", "cancelled",
)  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    VICTIM: {"labels": [["purple cube"], ["purple cube", "red cube"]], "steps": 8, "seed": 1, "trajectory": 2},
    BYSTANDER: {"labels": [["red cube"], ["blue sphere", "gray cube"]], "steps": 6, "seed": 2, "sampler": "ddim"},
    OTHER_OWNER: {"labels": [["cyan cylinder"]], "steps": 4, "seed": 3},
    OTHER_MODEL: {"labels": [["green cube"], ["red sphere"]], "steps": 3, "seed": 4, "model": "other"},
    CANCELLED: {"labels": [["gray sphere"]] * 2, "steps": 900, "seed": 5},
}
UPLOADED = zipped({"0.png": png(0), "1.png": png(1)})
UPLOADED_LISTS = json.dumps([["red cube"], ["blue sphere"]])
LATER = {"labels": [["yellow cube"]], "steps": 2, "seed": 6}
PATHS = ("/readyz", "/models", "/labels", "/metrics")
NOTIFIED = (VICTIM, BYSTANDER)  # jobs with a webhook
RETRY_S = 0.05


class Receiver(http.server.ThreadingHTTPServer):
    """Accepts webhooks. `got`: their ids."""

    daemon_threads = True

    def __init__(self) -> None:
        got = self.got = set[str]()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                got.add(self.headers["webhook-id"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class SweptStack(Stack):
    """A service whose boundaries fail as `book` orders."""

    def __init__(self, folder: Path, forks: ForkServer) -> None:
        super().__init__(folder, ENVIRONMENT, clocks=False)
        self.forks, self.book, self.receiver = forks, OrderBook(folder), Receiver()
        self.environment[FOLDER] = str(folder)
        other = read_info(resolve(folder / "storage", "other", "denoiser"))
        self.other_digest = other.digest
        # Of a call that concerns several, the first one is failed for good.
        self.marks = {
            VICTIM: [VICTIMS["victim"], "purple cube"],
            UPLOAD: [VICTIMS["upload"]],
            OTHER_MODEL: [other.digest, "other.safetensors", '"other"'],
            OTHER_OWNER: ["owner-b"],
        }

    def run(self, name: str, command: str, **environment: str) -> None:
        arguments, log = command.removeprefix("service ").split(), self.folder / f"{name}.log"
        self.children[name] = Child(name, lambda: self.forks.start(arguments, {**self.environment, **environment}, log))

    def start(self, workers: int = WORKERS, worker_command: str = "service worker") -> None:
        super().start(workers, worker_command)

    def is_back(self, name: str, before: Any) -> bool:
        """Whether a process has taken the place of `before`, and is ready."""
        process = self.children[name].process
        if process is before or not self._is_ready():
            return False
        return name == "api" or process.pid in [about["pid"] for about in list_live(self.connection)]

    def stop(self) -> None:
        super().stop()
        self.connection.close()
        self.receiver.shutdown()
        self.receiver.server_close()

    def left(self) -> dict[str, Any]:
        """Return what must be as before once all jobs are deleted: queues, leases, keys, files and threads."""
        kept = ("worker", "workers", "rate", "models", "stored", "suspects", "loading")
        names = [str(key) for key in self.connection.scan_iter("labelgrid:*")]
        found: dict[str, Any] = {}
        for name in names:
            kind = name.split(":")[1]
            if kind == "pictures":
                if entries := self.connection.xlen(name):
                    found[f"entries of {name[:24]}"] = entries
                if leases := self.connection.xpending(name, "workers")["pending"]:
                    found[f"leases of {name[:24]}"] = leases
            elif name.endswith(":watched") and self.connection.ttl(name) >= 0:  # it goes by itself, in seconds
                continue
            elif kind not in kept and not (kind == "turns" and name.count(":") == 2):  # an owner stays until their turn
                found[name] = self.connection.type(name)
        pictures = self.folder / "pictures"
        for file in [path for path in self.folder.rglob("*") if path.is_file()]:
            if file.suffix == ".tmp" or file.is_relative_to(pictures):
                found[str(file.relative_to(self.folder))] = "file"
        return found

    def threads(self) -> dict[str, int]:
        """Return how many threads each process has."""
        counts = {}
        for name, child in self.children.items():
            if name != "redis":
                with contextlib.suppress(OSError):
                    counts[name] = len(os.listdir(f"/proc/{child.process.pid}/task"))
        return counts

    def open_files(self) -> dict[str, int]:
        """Return how many files of the stack's storage each process has open."""
        counts = {}
        for name, child in self.children.items():
            with contextlib.suppress(OSError):
                paths = [os.readlink(fd.path) for fd in os.scandir(f"/proc/{child.process.pid}/fd")]
                ours = [path for path in paths if path.startswith(str(self.folder)) and name != "redis"]
                counts[name] = sum(not path.endswith((".log", "/order")) for path in ours)
        return counts


@contextlib.contextmanager
def running(forks: ForkServer, keep_logs: Path, phase: str = "") -> Iterator[SweptStack]:
    """Run a service, of whose folder only the logs are kept. With `phase` it records the places of its start."""
    with TemporaryDirectory(prefix="lg-anywhere-") as folder:
        stack = SweptStack(Path(folder), forks)
        if phase:
            stack.book.record(Recording(phase, stack.marks))
        try:
            stack.start()
            yield stack
        finally:
            stack.stop()
            keep_logs.mkdir(parents=True, exist_ok=True)
            for log in Path(folder).glob("*.log"):
                (keep_logs / log.name).write_bytes(log.read_bytes())


@dataclass
class Outcome:
    """What a load came to: ids, states and contents by name of a job, and what did not happen that must."""

    ids: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    later_s: float = 0.0


class Load:
    """Runs the fixed load once. `spared`: the name of the job that may fail, if any."""

    def __init__(self, stack: SweptStack, spared: str = "", for_good: bool = False, within_s: float = WITHIN_S) -> None:
        self.stack, self.spared, self.for_good, self.within_s = stack, spared, for_good, within_s
        self.out = Outcome()
        self.deadline = time.monotonic() + within_s
        self._log_at = sum(path.stat().st_size for path in history.files(stack.redis.folder))
        self._client = httpx.Client(base_url=stack.address, timeout=10)
        self._threads = ThreadPoolExecutor(8)
        self._done = threading.Event()

    def _request(
        self, method: str, path: str, owner: str = "owner-a", tries: int = 1000, about: str = "", **options: Any
    ) -> Any:
        """Send a request until it is answered without a server's error. None if it never is, which is a problem.

        about: the name of the job that it concerns, if the path does not say so.
        """
        headers = {"Authorization": f"Bearer {OWNERS[owner]}", **options.pop("headers", {})}
        why, deadline = "", max(self.deadline, time.monotonic() + 1)
        while tries > 0 and time.monotonic() < deadline:
            tries -= 1
            try:
                answer = self._client.request(method, path, headers=headers, **options)
                if answer.status_code < 500 and answer.status_code != 429:
                    return answer
                why = f"{answer.status_code} {answer.text[:200]}"
            except httpx.TransportError as error:
                why = type(error).__name__
            time.sleep(RETRY_S)
        self._note(f"{method} {path} got no answer: {why}", about or path)
        return None

    def _note(self, problem: str, about: str) -> None:
        """Note a problem, unless it is that of the job which may fail."""
        own = self.out.ids.get(self.spared, self.spared)
        if not (self.spared and (own in about or about == self.spared)):
            self.out.problems.append(problem)

    def submit(self) -> None:
        files = {"file": ("test.json", UPLOADED_LISTS), "pictures": ("pictures.zip", UPLOADED)}
        sent = [self._threads.submit(self._submit, UPLOAD, "/score", files=files)]
        for name, body in BODIES.items():
            more = {"webhook": self.stack.receiver.address} if name in NOTIFIED else {}
            sent.append(self._threads.submit(self._submit, name, "/generate", json={**body, **more}))
        for one in sent:
            one.result()

    def _submit(self, name: str, path: str, **options: Any) -> None:
        headers = {"Prefer": "respond-async", "Idempotency-Key": uuid4().hex, "X-Request-ID": name}
        owner = "owner-b" if name == OTHER_OWNER else "owner-a"
        tries = 3 if name == self.spared and self.for_good else 1000
        answer = self._request("POST", path, owner, tries, name, headers=headers, **options)
        if answer is not None and answer.status_code == 202:
            self.out.ids[name] = answer.json()["id"]
        elif answer is not None:
            self._note(f"{name}: {answer.status_code} {answer.text[:200]}", name)

    def run(self, restart: str = "") -> Outcome:
        """Submit all jobs, follow two, cancel one, wait for the others and read what they came to.

        restart: a process that is told to end as soon as the jobs are there, as in a rolling restart.
        """
        shutil.rmtree(self.stack.folder / "cache" / self.stack.other_digest, ignore_errors=True)  # it is copied anew
        self.submit()
        if restart:
            before = self.stack.children[restart].process
            self.stack.signal(restart, signal.SIGTERM)
        followers = [
            threading.Thread(target=self._follow, args=(name,), daemon=True)
            for name in (VICTIM, BYSTANDER)
            if name in self.out.ids
        ]
        for thread in followers:
            thread.start()
        self._cancel()
        self._wait_for_bystanders()
        self._later()
        self._wait_for_victim()
        if restart:
            with contextlib.suppress(NotInTime):
                until(lambda: self.stack.is_back(restart, before), f"a new {restart}", self.within_s, every_s=0.1)
        self._done.set()
        for thread in followers:
            thread.join()
        self._read()
        return self.out

    def _follow(self, name: str) -> None:
        """Follow a job as a browser does, which connects again, until its end is announced."""
        job_id, last = self.out.ids[name], ""
        headers = {"Authorization": f"Bearer {OWNERS['owner-a']}"}
        while time.monotonic() < self.deadline:
            try:
                path, own = f"{self.stack.address}/jobs/{job_id}/events", {"Last-Event-ID": last} if last else {}
                with httpx.stream("GET", path, headers={**headers, **own}, timeout=5) as answer:
                    if answer.status_code == 204:
                        return
                    for line in answer.iter_lines():
                        if line.startswith("id:"):
                            last = line[3:].strip()
                        if line == "event: end":
                            return
                        if self._done.is_set() and name == self.spared:
                            return
            except httpx.HTTPError:
                pass
            time.sleep(RETRY_S)
            if name == self.spared and self._done.is_set():
                return
        self._note(f"the events of {name} have no end", name)

    def _cancel(self) -> None:
        job_id = self.out.ids.get(CANCELLED)
        if job_id is None:
            return
        with contextlib.suppress(NotInTime):
            until(lambda: self._status(job_id) == "running", "the job to cancel to run", timeout_s=0.5)
        self._request("DELETE", f"/jobs/{job_id}?cancel_only=true")

    def _status(self, job_id: str) -> str:
        return str(self.stack.connection.hget(keys.job(job_id), "status"))

    def _wait(self, names: list[str], deadline: float) -> list[str]:
        """Wait for the end of jobs; return those that have not ended."""
        while left := [name for name in names if self._status(self.out.ids[name]) not in TERMINAL]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return left

    def _wait_for_bystanders(self) -> None:
        for name in self._wait([name for name in self.out.ids if name != self.spared], self.deadline):
            self.out.problems.append(f"{name} is {self._status(self.out.ids[name])} after {self.within_s:.0f} s")

    def _wait_for_victim(self) -> None:
        """Wait until the victim ends; if it waits for its storage, the fault ends first."""
        names = [name for name in self.out.ids if name == self.spared]
        if left := self._wait(names, time.monotonic() + self.within_s / 3):
            self.out.problems += [f"{name} did not end before the fault did" for name in left]
            self.stack.book.fail()
            for name in self._wait(left, time.monotonic() + self.within_s):
                self.out.problems.append(f"{name} is {self._status(self.out.ids[name])} {self.within_s:.0f} s after it")

    def _later(self) -> None:
        """Send a new job, which must succeed."""
        begun = time.monotonic()
        self.deadline = begun + self.within_s
        while time.monotonic() < self.deadline:
            answer = self._request("POST", "/generate", json=LATER, headers={"Prefer": "wait=5"})
            if answer is not None and answer.status_code == 200:
                self.out.later_s = time.monotonic() - begun
                self.out.ids["later"] = answer.json()["id"]
                return
            if answer is not None and answer.status_code == 202:
                self.out.ids["later"] = answer.json()["id"]
                if not self._wait(["later"], self.deadline):
                    self.out.later_s = time.monotonic() - begun
                    return
            elif answer is not None:
                self.out.problems.append(f"a new job: {answer.status_code} {answer.text[:200]}")
                return
        self.out.problems.append(f"a new job had not finished after {self.within_s:.0f} s")

    def _read(self) -> None:
        """Read what each job came to, and what concerns several jobs."""
        self.deadline = time.monotonic() + self.within_s
        for name, job_id in self.out.ids.items():
            self.out.states[name] = self._status(job_id)
            self.out.errors[name] = str(self.stack.connection.hget(keys.job(job_id), "error") or "")
        finished = [name for name, state in self.out.states.items() if state == "finished"]
        parts = [(name, part) for name in finished for part in ("", "/grid.png", "/pictures.zip")]
        parts += [(VICTIM, "/trajectories/0.png")] if VICTIM in finished else []
        reads = [self._threads.submit(self._read_part, *part) for part in parts]
        reads += [self._threads.submit(self._read_list, owner) for owner in OWNERS]
        reads += [self._threads.submit(self._read_path, path) for path in PATHS]
        for read in reads:
            read.result()
        for name in NOTIFIED:
            wanted = f"{self.out.ids.get(name)}.finished"
            if self.out.states.get(name) == "finished" and name != self.spared:
                with contextlib.suppress(NotInTime):
                    until(partial(self.stack.receiver.got.__contains__, wanted), "a webhook", self._left_s())
                if wanted not in self.stack.receiver.got:
                    self.out.problems.append(f"the webhook of {name} was not sent")

    def _read_part(self, name: str, part: str) -> None:
        job_id, owner = self.out.ids[name], "owner-b" if name == OTHER_OWNER else "owner-a"
        answer = self._request("GET", f"/jobs/{job_id}{part}", owner, 3 if name == self.spared else 1000)
        if answer is not None and answer.status_code == 200:
            self.out.contents[f"{name}{part}"] = answer.content if part else _comparable(answer, job_id)
        elif answer is not None:
            self._note(f"GET {part or 'job'} of {name}: {answer.status_code}", name)

    def _read_list(self, owner: str) -> None:
        is_spared = self.spared == OTHER_OWNER and owner == "owner-b"
        answer = self._request(
            "GET", "/jobs?limit=100", owner, 3 if is_spared else 1000, OTHER_OWNER if is_spared else ""
        )
        if answer is not None:
            listed = {job["id"] for job in answer.json()["jobs"]} if answer.status_code == 200 else set()
            for name, job_id in self.out.ids.items():
                if job_id not in listed and (name == OTHER_OWNER) == (owner == "owner-b"):
                    self._note(f"{name} is not in the list of jobs", name)

    def _read_path(self, path: str) -> None:
        answer = self._request("GET", path)
        if answer is not None and answer.status_code != 200:
            self.out.problems.append(f"{path}: {answer.status_code} {answer.text[:200]}")

    def _left_s(self) -> float:
        return max(0.1, self.deadline - time.monotonic())

    def histories(self) -> dict[str, history.History]:
        """Return the histories of the jobs since this load began."""
        log, before = b"", self._log_at
        for path in history.files(self.stack.redis.folder):
            with path.open("rb") as file:
                file.seek(before)
                log += file.read()
            before = max(0, before - path.stat().st_size)
        return history.histories(log)

    def check_states(self) -> list[str]:
        """Return which jobs did not have exactly one end, or had a picture twice."""
        found = self.histories()
        names = {job_id: name for name, job_id in self.out.ids.items()}
        problems = []
        for job_id, job in found.items():
            name = names.get(job_id, "a job that nobody was told of")
            if name in names.values():
                problems += [f"{name}: {problem}" for problem in (*checks.check_states(job), *job.late)]
                twice = [index for index, count in job.stored.items() if count > 1]
                problems += [f"{name}: pictures {twice} were stored twice"] if twice else []
        return problems

    def clear(self) -> None:
        """Delete all jobs, also those that nobody was told of."""
        self.deadline = time.monotonic() + self.within_s
        deletions = []
        for owner in OWNERS:
            members: Any = self.stack.connection.zrange(keys.jobs(owner), 0, -1)
            ids = [member.partition("-")[2] for member in members]
            deletions += [self._threads.submit(self._delete, owner, job_id) for job_id in ids]
        for one in deletions:
            one.result()

    def _delete(self, owner: str, job_id: str) -> None:
        for _ in range(2):  # one that has not ended is cancelled first
            if self.stack.connection.exists(keys.job(job_id)):
                tries = 3 if job_id == self.out.ids.get(self.spared) else 1000
                self._request("DELETE", f"/jobs/{job_id}", owner, tries)

    def wait_until_clear(self, threads: Mapping[str, int]) -> list[str]:
        """Return what is left over. `threads`: how many each process may have."""
        looks: list[Callable[[], list[str]]] = [
            lambda: [f"left over: {what} ({kind})" for what, kind in self.stack.left().items()],
            lambda: [
                f"{name} has {count} threads, not {threads.get(name, 0)}"
                for name, count in self.stack.threads().items()
                if count > threads.get(name, count)
            ],
            lambda: [f"{name} has {count} open files" for name, count in self.stack.open_files().items() if count],
        ]
        problems = []
        deadline = time.monotonic() + self.within_s
        for look in looks:
            while (found := look()) and time.monotonic() < deadline:
                time.sleep(0.1)
            problems += found
        return problems

    def close(self) -> None:
        self._threads.shutdown()
        self._client.close()


def _comparable(answer: httpx.Response, job_id: str) -> bytes:
    """Return a job's result, without what differs from run to run.

    Probabilities to three digits: uploaded pictures are judged alone or together, and the sums differ by rounding.
    """
    result = json.loads(json.dumps(answer.json()["result"]), parse_float=lambda text: round(float(text), 3))
    return json.dumps(result).replace(job_id, "ID").encode()
