"""One trial: sends requests around a fault, measures the recovery, and checks every job."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import httpx

from faults import checks, history
from faults.checks import Fetched
from faults.harness import Stack, expect, settled, until
from service.files import GRID, PictureFiles, picture_name
from service.store import keys

# Long enough to be hit in the middle of a batch, and each sampled differently. A toy's step takes a few milliseconds.
LABELS = [["red cube"], ["blue sphere", "gray cube"], ["cyan cylinder"], ["green cube", "red sphere", "yellow cube"]]
BODIES: list[dict[str, Any]] = [
    {"labels": LABELS[:1], "steps": 4, "seed": 1},  # sent by `Traffic`
    {"labels": LABELS * 2, "steps": 150, "seed": 2},
    {"labels": LABELS * 2, "steps": 250, "seed": 3, "sampler": "ddim", "eta": 0.5},
    {"labels": LABELS * 2, "steps": 100, "seed": 4, "sampler": "ddpm", "guidance": 1.0},
    {"labels": LABELS * 2, "steps": 200, "seed": 5, "sampler": "dpmpp_2m", "guidance": 5.0},
    # the toy evaluator finds nothing exact
    {"labels": LABELS, "steps": 75, "seed": 6, "sampler": "euler", "until": "exact", "attempts": 4, "deadline_s": 7200},
]
SMALL, LARGE = 0, tuple(range(1, len(BODIES)))
OF_THE_RELEASE = LARGE[:-1]  # what the release before this one knows, too
EVERY_S = 0.25  # between two requests of `Traffic`
RETRY_S = 0.1  # before a retry


class Traffic(threading.Thread):
    """A client that requests a picture every `EVERY_S`, and retries with the same key until it is accepted."""

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
        except Exception as error:  # raised in the trial's thread
            self.error = error

    def __enter__(self) -> "Traffic":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended.set()
        self.join()
        if kind is None and self.error:
            raise self.error


def fetched(files: PictureFiles, job_id: str, total: int) -> Fetched:
    """Return the pictures and the grid of a finished job. FileNotFoundError if they were deleted."""
    found = [files.read(job_id, picture_name(index)) for index in range(total)]
    return Fetched(found, files.read(job_id, GRID) if total > 1 else found[0])


class Trial:
    """A running service, the jobs that it accepted, and the time of the fault."""

    def __init__(
        self, stack: Stack, headers: Mapping[str, str], say: Callable[[str], None], more: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.stack, self.headers, self.say = stack, headers, say
        self.bodies = [*BODIES, *more]  # `more`: of this fault alone
        self.jobs: dict[str, int | None] = {}  # id of each accepted job -> its index in `bodies`, if any
        self.failing: dict[str, str] = {}  # ids of jobs that must fail -> part of their error
        self.others: set[str] = set()  # ids of jobs that must finish, with pictures that nothing else has
        self.deleted: set[str] = set()  # ids of jobs that the trial deletes
        self.recovery_s = 0.0
        self.undisturbed: dict[int, Fetched] = {}
        self.undisturbed_s = 0.0  # from submitting all `bodies` to their end, without a fault
        self.struck_at = 0.0
        self._open_then: set[str] = set()

    # --- requests ---

    def post(
        self, body: Mapping[str, Any], key: str | None = None, path: str = "/generate", **headers: str
    ) -> dict[str, Any]:
        """Send a request, retry with the same key until it is accepted, and return the job. NotInTime."""
        headers = {**self.headers, **headers, "Idempotency-Key": key or uuid4().hex}

        def send() -> httpx.Response:
            return httpx.post(self.stack.address + path, json=body, timeout=30, headers=headers)

        answer = until(lambda: settled(send), "a request to be accepted", every_s=RETRY_S)
        job: dict[str, Any] = expect(answer, 200, 202).json()
        return job

    def submit(self, *bodies: int) -> list[str]:
        """Submit these of `bodies`, by index, without waiting, and return the jobs' ids."""
        ids = []
        for number in bodies:
            ids.append(self.post(self.bodies[number], Prefer="respond-async")["id"])
            self.jobs[ids[-1]] = number
        return ids

    def submit_failing(self, labels: list[list[str]], reason: str, **options: Any) -> str:
        """Submit a job that must fail with an error that contains `reason`, and return its id."""
        job_id: str = self.post({"labels": labels, **options}, Prefer="respond-async")["id"]
        self.jobs[job_id], self.failing[job_id] = None, reason
        return job_id

    def must_finish(self, *ids: str) -> None:
        """Note accepted jobs of which nothing else is known."""
        self.jobs |= dict.fromkeys(ids)
        self.others |= set(ids)

    def run_undisturbed(self) -> None:
        """Run all `bodies` without a fault. All later pictures must equal these."""
        numbers, begun = range(len(self.bodies)), time.monotonic()
        ids = self.submit(*numbers)
        self.wait(ids)
        self.undisturbed_s = time.monotonic() - begun
        self.undisturbed = {number: self._fetch(job_id, number) for number, job_id in zip(numbers, ids, strict=True)}

    def wait(self, ids: Sequence[str]) -> None:
        until(lambda: not self._open(ids), f"the end of {len(ids)} jobs")

    def is_open(self, job_id: str) -> bool:
        return bool(self._open([job_id]))

    def _open(self, ids: Sequence[str]) -> set[str]:
        return set(ids) - self.stack.store.ended(ids)

    # --- the fault ---

    def begin(self, bodies: Sequence[int] = LARGE) -> str:
        """Submit large jobs, wait for a first picture, and return the worker with most pictures in progress."""
        ids = self.submit(*bodies)
        until(lambda: any(self.stack.connection.exists(keys.verdicts(job_id)) for job_id in ids), "a first picture")
        return self.busiest()

    def busiest(self) -> str:
        """Return the worker with most pictures in progress."""
        in_progress = until(self.stack.in_progress, "pictures in progress")
        return max(in_progress, key=lambda name: in_progress[name])

    def strike(self, fault: Callable[[], object]) -> None:
        """Inject the fault; note the time, the pictures in progress and the open jobs."""
        self._open_then = self._open(list(self.jobs))
        in_progress = self.stack.in_progress()
        if not in_progress:
            raise RuntimeError("no picture was in progress at the fault: the trial shows nothing")
        self.say(f"fault, with {in_progress} pictures in progress and {len(self._open_then)} open jobs")
        self.struck_at = time.monotonic()
        fault()

    def end(self, fault: Callable[[], object] = lambda: None) -> None:
        """End a lasting fault, unless it has ended by itself: recovery is measured from here."""
        self.struck_at = time.monotonic()
        fault()

    def recover(self) -> None:
        """Wait until a new request has its picture and all jobs open at the fault have ended; note the time.

        These jobs' own work, at most that of an undisturbed run, does not count.
        """
        job = self.post(BODIES[SMALL])
        self.jobs[job["id"]] = SMALL
        answered_s = time.monotonic() - self.struck_at
        self.say(f"a new request was answered after {answered_s:.1f} s")
        self.wait([job["id"], *self._open_then])
        ended_s = time.monotonic() - self.struck_at
        self.recovery_s = max(self.recovery_s, answered_s, ended_s - self.undisturbed_s)
        self.say(f"all open jobs had ended after {ended_s:.1f} s; without a fault they take {self.undisturbed_s:.1f} s")

    # --- outcome ---

    def _fetch(self, job_id: str, number: int) -> Fetched:
        return fetched(PictureFiles(self.stack.store.settings.pictures), job_id, len(self.bodies[number]["labels"]))

    def check(self) -> list[str]:
        """Wait for the end of all jobs and return all problems."""
        self.wait(list(self.jobs))
        histories = history.read(self.stack.redis.folder)
        problems = [f"job {job_id} exists but was not accepted" for job_id in histories.keys() - self.jobs.keys()]
        for job_id, number in self.jobs.items():
            if job_id not in histories:
                problems.append(f"job {job_id} was accepted but does not exist")
                continue
            problems += [f"job {job_id}: {problem}" for problem in self._problems(job_id, number, histories[job_id])]
        return problems + self._left_over()

    def _problems(self, job_id: str, number: int | None, job: history.History) -> list[str]:
        found = checks.check_states(replace(job, deleted=job.deleted and job_id not in self.deleted)) + job.late
        error: Any = self.stack.store.connection.hget(keys.job(job_id), "error")
        if (reason := self.failing.get(job_id)) is not None:
            expected = bool(error) and reason in error
            return found if expected else [*found, f"it should fail with {reason!r}, not {error!r}"]
        if job_id in self.others and job.states[-1:] == ["finished"]:
            return found
        if number is None or job.states[-1:] != ["finished"]:
            return [*found, f"it did not finish: {error!r}"]
        total = len(self.bodies[number]["labels"])
        fetched, undisturbed = self._fetch(job_id, number), self.undisturbed[number]
        return found + checks.check_pictures(job, total, fetched, undisturbed)

    def _left_over(self) -> list[str]:
        """Return what is left in queues after all jobs ended. Workers get half a minute to clear it."""
        connection, digest = self.stack.connection, self.stack.digest

        def left() -> dict[str, int]:
            counts = {
                "open jobs": connection.zcard(keys.DEADLINES),
                "deadlines": connection.scard(keys.TIMED),
                "pictures in the stream": connection.xlen(keys.pictures(digest)),
                "waiting pictures": sum(int(n) for n in connection.hvals(keys.waiting(digest))),
            }
            return {what: count for what, count in counts.items() if count}

        deadline = time.monotonic() + 30
        while (found := left()) and time.monotonic() < deadline:
            time.sleep(RETRY_S)
        return [f"{count} {what} are left over" for what, count in found.items()]
