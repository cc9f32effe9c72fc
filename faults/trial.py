"""One fault on trial: what is asked for around it, how long it disturbs, and what came of each job."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import httpx

from faults import checks, journal
from faults.checks import Fetched
from faults.harness import Stack, until
from service.contract.records import TERMINAL
from service.store.keys import GRID, OPEN, job_key, pending_counts_key, png_key, stream_key

# Long enough to be met in the middle of a batch; no two are sampled alike. A toy's step is a few milliseconds.
LABELS = [["red cube"], ["blue sphere", "gray cube"], ["cyan cylinder"], ["green cube", "red sphere", "yellow cube"]]
BODIES: list[dict[str, Any]] = [
    {"labels": LABELS[:1], "steps": 4, "seed": 1},  # what `Traffic` asks for
    {"labels": LABELS * 2, "steps": 150, "seed": 2},
    {"labels": LABELS * 2, "steps": 250, "seed": 3, "sampler": "ddim", "eta": 0.5},
    {"labels": LABELS * 2, "steps": 100, "seed": 4, "sampler": "ddpm", "guidance": 1.0},
    {"labels": LABELS * 2, "steps": 200, "seed": 5, "sampler": "dpmpp_2m", "guidance": 5.0},
    {"labels": LABELS, "steps": 300, "seed": 6, "sampler": "euler"},
]
SMALL, LARGE = 0, tuple(range(1, len(BODIES)))
EVERY_S = 0.25  # between two requests of `Traffic`
AGAIN_S = 0.1  # before a request is sent again


class Traffic(threading.Thread):
    """A client that asks for a picture every so often, and again with the same key until it is accepted."""

    def __init__(self, trial: "Trial") -> None:
        super().__init__(name="traffic")
        self.trial, self.ended = trial, threading.Event()
        self.longest_s = 0.0  # from a request's first try to its acceptance
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self.ended.wait(EVERY_S):
                begun = time.monotonic()
                self.trial.submit(SMALL)
                self.longest_s = max(self.longest_s, time.monotonic() - begun)
        except Exception as error:  # the trial's own thread raises it
            self.error = error

    def __enter__(self) -> "Traffic":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended.set()
        self.join()
        if kind is None and self.error:
            raise self.error


class Trial:
    """A running service, the jobs that it accepted, and the moment of the fault."""

    def __init__(self, stack: Stack, headers: Mapping[str, str], say: Callable[[str], None]) -> None:
        self.stack, self.headers, self.say = stack, headers, say
        self.jobs: dict[str, int | None] = {}  # id of each accepted job -> which of BODIES it is of, if it is
        self.failing: dict[str, str] = {}  # jobs that are to fail -> what their error says
        self.figures: dict[str, float] = {}
        self.recovery_s = 0.0
        self.undisturbed: dict[int, Fetched] = {}
        self.struck_at = 0.0
        self._open_then: set[str] = set()

    # --- asking ---

    def post(self, body: Mapping[str, Any], key: str | None = None, **headers: str) -> dict[str, Any]:
        """The job that a request is accepted as, sent again with the same key until it is. NotInTime."""
        headers = {**self.headers, **headers, "Idempotency-Key": key or uuid4().hex}

        def accepted() -> dict[str, Any] | None:
            try:
                answer = httpx.post(f"{self.stack.address}/generate", json=body, timeout=30, headers=headers)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code in (200, 202):
                job: dict[str, Any] = answer.json()
                return job
            if answer is not None and answer.status_code not in (429, 503):
                raise RuntimeError(f"POST /generate was answered {answer.status_code}: {answer.text[:300]}")
            time.sleep(AGAIN_S)
            return None

        return until(accepted, "a request to be accepted")

    def submit(self, *bodies: int) -> list[str]:
        """Jobs of these of BODIES, accepted and not waited for."""
        ids = []
        for number in bodies:
            ids.append(self.post(BODIES[number], Prefer="respond-async")["id"])
            self.jobs[ids[-1]] = number
        return ids

    def submit_failing(self, labels: list[list[str]], reason: str) -> str:
        """A job that is to fail, with an error that has `reason` in it."""
        job_id: str = self.post({"labels": labels}, Prefer="respond-async")["id"]
        self.jobs[job_id], self.failing[job_id] = None, reason
        return job_id

    def run_undisturbed(self) -> None:
        """Every one of BODIES without any fault: what all later ones must equal."""
        numbers = range(len(BODIES))
        ids = self.submit(*numbers)
        self.wait(ids)
        self.undisturbed = {number: self._fetch(job_id, number) for number, job_id in zip(numbers, ids, strict=True)}

    def wait(self, ids: Sequence[str]) -> None:
        until(lambda: not self._open(ids), f"the end of {len(ids)} jobs")

    def _open(self, ids: Sequence[str]) -> set[str]:
        return {job_id for job_id, status in self.stack.store.statuses(ids).items() if status not in TERMINAL}

    # --- the fault ---

    def begin(self) -> str:
        """Large jobs, some pictures of which are made and some in work. Returns the worker that has most in work."""
        ids = self.submit(*LARGE)
        until(lambda: any(self.stack.store.done_indices(job_id) for job_id in ids), "a first picture")
        return self.busiest()

    def busiest(self) -> str:
        until(lambda: self.stack.in_work(), "pictures in work")
        in_work = self.stack.in_work()
        return max(in_work, key=lambda name: in_work[name])

    def strike(self, fault: Callable[[], object]) -> None:
        """Does the fault, and notes when, what was in work and which jobs were open."""
        self._open_then = self._open(list(self.jobs))
        in_work = self.stack.in_work()
        if not in_work:
            raise RuntimeError("nothing was in work when the fault came: this shows nothing")
        self.figures |= {
            "pictures in work at the fault": sum(in_work.values()),
            "jobs open at the fault": len(self._open_then),
        }
        self.say(f"fault, with {in_work} pictures in work and {len(self._open_then)} jobs open")
        self.struck_at = time.monotonic()
        fault()

    def end(self, fault: Callable[[], object]) -> None:
        """Ends a fault that lasts: from here on recovery is measured."""
        self.struck_at = time.monotonic()
        fault()

    def recover(self) -> None:
        """Waits until a request sent now has its picture and the jobs open at the fault have ended; notes the time."""
        job = self.post(BODIES[SMALL])
        self.jobs[job["id"]] = SMALL
        self.say(f"a new request was answered after {time.monotonic() - self.struck_at:.1f} s")
        self.wait([job["id"], *self._open_then])
        self.recovery_s = max(self.recovery_s, time.monotonic() - self.struck_at)
        self.say(f"recovered after {self.recovery_s:.1f} s")

    # --- what came of it ---

    def _fetch(self, job_id: str, number: int) -> Fetched:
        store, total = self.stack.store, len(BODIES[number]["labels"])
        grid: Any = store.connection.hget(png_key(job_id), GRID)
        return Fetched(store.pngs(job_id, range(total)), grid or b"")

    def examine(self) -> list[str]:
        """Waits for the end of all jobs, then says what is wrong with any of them; nothing, if all is well."""
        self.wait(list(self.jobs))
        stories = journal.read(self.stack.redis.folder)
        wrong = [f"job {job_id} is there and was not accepted" for job_id in stories.keys() - self.jobs.keys()]
        for job_id, number in self.jobs.items():
            if job_id not in stories:
                wrong.append(f"job {job_id} was accepted and is nowhere")
                continue
            wrong += [f"job {job_id}: {complaint}" for complaint in self._complaints(job_id, number, stories[job_id])]
        return wrong + self._left_over()

    def _complaints(self, job_id: str, number: int | None, story: journal.Story) -> list[str]:
        found = checks.check_states(story)
        error: Any = self.stack.store.connection.hget(job_key(job_id), "error")
        if (reason := self.failing.get(job_id)) is not None:
            as_said = bool(error) and reason in error.decode()
            return found if as_said else [*found, f"it should fail with {reason!r}, not {error!r}"]
        if number is None or story.states[-1:] != ["finished"]:
            return [*found, f"it did not finish: {error!r}"]
        total = len(BODIES[number]["labels"])
        return found + checks.check_pictures(story, total, self._fetch(job_id, number), self.undisturbed[number])

    def _left_over(self) -> list[str]:
        """What Redis still has of work, once all has ended; workers may take a moment to clear it."""
        connection, digest = self.stack.connection, self.stack.digest

        def left() -> dict[str, int]:
            counts = {
                "open jobs": connection.scard(OPEN),
                "pictures in the stream": connection.xlen(stream_key(digest)),
                "waiting pictures": sum(int(n) for n in connection.hvals(pending_counts_key(digest))),
                "queued RQ jobs": len(self.stack.store.queue),
            }
            return {what: count for what, count in counts.items() if count}

        deadline = time.monotonic() + 30
        while (found := left()) and time.monotonic() < deadline:
            time.sleep(AGAIN_S)
        return [f"{count} {what} are left over" for what, count in found.items()]
