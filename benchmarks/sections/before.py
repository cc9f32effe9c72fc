"""This commit beside the last one with packed torch networks: `python -m benchmarks.sections.before`.

The older commit runs from a git worktree under build/, in processes of its own, with its own checkpoints, Redis and
caches. The two take turns: network calls; whole requests on the quiet machine, and beside one and two processes that
compute all the time; the start of a worker, and of the whole service.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks import subject
from benchmarks.busy import busy
from benchmarks.clients import Body, for_seconds, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import ROOT, Data, machine, main, say
from benchmarks.sections.servers import ask
from benchmarks.sections.startup import first_picture
from benchmarks.stack import Stack, cpu_s, redis_server, stack
from benchmarks.timing import Deadline, figure, order, paired, percentile, pooled_p95
from benchmarks.trees import HERE, Tree, checkout

BEFORE = "9d6151c"  # the last commit whose networks run in packed torch on a CPU
CALLS = {1: 12, 8: 4, 32: 2}  # network rows of a call -> calls of a measurement
CALLS_S, REQUESTS_S, STARTS_S = 45.0, 240.0, 90.0  # limits
CLIENTS = 8
WARM_S = 8.0  # of requests before those that count: a worker compiles the sizes of its calls when they first come
SPANS_S = {0: 6.0, 1: 12.0, 2: 12.0}  # busy processes -> how long clients send requests
# a worker until it is ready and until its first picture, at its first and second start; the service until a picture
STARTS = ("worker_ready", "worker_picture", "worker_ready_again", "worker_picture_again", "service_picture")
# speed-ups of network calls, with AMX and without
SPEED_UPS = {True: {1: 1.5, 8: 1.4, 32: 1.3}, False: {1: 1.3, 8: 1.2, 32: 1.0}}


class Caller:
    """A process with a tree's code that makes network calls when it is asked to."""

    def __init__(self, tree: Tree) -> None:
        command = [sys.executable, "-P", str(ROOT / "benchmarks" / "calls.py"), str(tree.storage)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self._process = subprocess.Popen(command, cwd=tree.folder, env=tree.environment(), **pipes)
        self.about: Data = json.loads(self._line())
        if Path(self.about["code"]) != tree.folder:
            self.close()
            raise RuntimeError(f"{tree.name} runs the code of {self.about['code']}, not of {tree.folder}")

    def _line(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return str(line)
        raise RuntimeError(f"the process that makes network calls ended with exit status {self._process.wait()}")

    def __call__(self, rows: int) -> float:
        """Return the seconds of a call of so many rows."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rows} {CALLS[rows]}\n")
        return float(self._line())

    @property
    def returncode(self) -> int | None:
        """The exit status once the process has ended."""
        return self._process.returncode

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True)
class Served:
    """What clients got while they sent requests for a while."""

    seconds: float  # until the last answer
    latencies: list[float]

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds


Trees = tuple[Tree, Tree]  # the older one and this one
Both = tuple[list[Served], list[Served]]  # of theirs, by round


def calls(trees: Trees, rounds: int) -> tuple[dict[int, tuple[list[float], list[float]]], list[Data]]:
    """Return the seconds of calls by rows, those of both trees by round; and what each process measured."""
    with contextlib.ExitStack() as running:
        callers = [running.enter_context(contextlib.closing(Caller(tree))) for tree in trees]
        taken: dict[int, tuple[list[float], list[float]]] = {rows: ([], []) for rows in CALLS}
        for turn in Deadline(CALLS_S).rounds(rounds):
            for rows, both in taken.items():
                for place in order(turn):
                    both[place].append(callers[place](rows))
        return taken, [caller.about for caller in callers]


def body(number_: int) -> Body:
    """Return a request of one picture."""
    (labels,) = subject.label_lists(1, seed=number_)
    return {"labels": [labels], "seed": number_}


def serve(port: int, span_s: float, clients: int = CLIENTS) -> Served:
    """Let clients send requests for `span_s`, each the next one after its answer, and wait for all answers."""
    begun = time.perf_counter()
    latencies = send_all(port, for_seconds(span_s, body), clients, ask)
    return Served(time.perf_counter() - begun, latencies)


def settle(running: Stack, limit_s: float = 40.0) -> None:
    """Wait until a worker that has nothing to do does nothing: some measure the network when they become idle."""
    deadline, worker = Deadline(limit_s), running.workers[0].pid
    for _ in deadline.rounds(1000):
        before = cpu_s(worker)
        time.sleep(1.0)
        if cpu_s(worker) - before < 0.1:
            return


def own_home(folder: str) -> dict[str, str]:
    """Return variables that make a process keep its caches in `folder`."""
    cache = str(Path(folder) / "cache")
    return {"HOME": folder, "XDG_CACHE_HOME": cache, "LABELGRID_CACHE": cache}


@contextlib.contextmanager
def services(trees: Trees) -> Iterator[list[Stack]]:
    """Run the services of both trees, warm and idle."""
    with contextlib.ExitStack() as running:
        found = []
        for tree in trees:
            home = running.enter_context(tempfile.TemporaryDirectory(prefix="lg-bench-"))
            found.append(running.enter_context(stack(tree=tree, **own_home(home))))
            serve(found[-1].port, WARM_S)
            settle(found[-1])
        yield found


def requests(trees: Trees, spans_s: dict[int, float], rounds: int) -> dict[int, Both]:
    """Return what clients of both services got, by busy processes and round."""
    seen: dict[int, Both] = {count: ([], []) for count in spans_s}
    with services(trees) as both:
        deadline = Deadline(REQUESTS_S)
        for turn in deadline.rounds(rounds):
            for count, span_s in spans_s.items():
                with busy(count):
                    for place in order(turn):
                        seen[count][place].append(serve(both[place].port, span_s))
            say(f"  requests, round {turn + 1}, {deadline.spent:.0f} s")
    return seen


def worker_start(tree: Tree, home: dict[str, str]) -> tuple[float, float]:
    """Return the seconds from a worker's start until it is ready, and until its first picture."""
    with stack(workers=0, tree=tree, **home) as running:
        begun = time.perf_counter()
        running.start_workers(1)
        ready_s = time.perf_counter() - begun
        ask(HTTPConnection("127.0.0.1", running.port), body(0))
        return ready_s, time.perf_counter() - begun


def start_seconds(tree: Tree) -> dict[str, float]:
    """Return the seconds of each of STARTS. The first ones find empty caches."""
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as home:
        first, again = (worker_start(tree, own_home(home)) for _ in range(2))
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as home, redis_server() as redis:
        # both with the same Redis server, since the older commit's own may not be installed
        whole = first_picture(tree, LABELGRID_REDIS_URL=redis.url, **own_home(home))["first_picture_s"]
    return dict(zip(STARTS, (*first, *again, whole), strict=True))


def starts(
    trees: Trees, rounds: int, seconds_of: Callable[[Tree], dict[str, float]] = start_seconds
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the seconds of each of STARTS, of both trees by round."""
    taken: dict[str, tuple[list[float], list[float]]] = {key: ([], []) for key in STARTS}
    for turn in Deadline(STARTS_S).rounds(rounds):
        for place in order(turn):
            for key, seconds in seconds_of(trees[place]).items():
                taken[key][place].append(seconds)
    return taken


def measure(quick: bool) -> Data:
    before = checkout(BEFORE)
    if before is None:
        reason = f"this clone has no commit {BEFORE}; `git fetch --unshallow` gets it"
        say(f"  skipped: {reason}")
        return {"figures": {}, "skipped": reason}
    trees = before, HERE
    for tree in trees:
        tree.compile()
    called, about = calls(trees, 2 if quick else 15)
    say(f"  network calls of both commits, {len(called[1][0])} rounds")
    seen = requests(trees, dict.fromkeys(SPANS_S, 2.0) if quick else SPANS_S, 1 if quick else 4)
    started = starts(trees, 1 if quick else 3)
    return {
        "figures": figures(called, seen, started),
        "goals": goals("amx_bf16" in machine()["features"]),
        "names": [tree.name for tree in trees],
        "libraries": [one["library"] for one in about],
        "same_checkpoint": about[0]["digest"] == about[1]["digest"],
        "calls": {rows: [figure(rows / s for s in one) for one in both] for rows, both in called.items()},
        "requests": {count: [described(runs) for runs in both] for count, both in seen.items()},
    }


def figures(
    called: dict[int, tuple[list[float], list[float]]],
    seen: dict[int, Both],
    started: dict[str, tuple[list[float], list[float]]],
) -> Data:
    """Return the ratios of this commit to the older one. Those of calls are speed-ups, those of starts are times."""
    found = {f"before.call_speedup_{rows}_rows": paired(theirs, ours) for rows, (theirs, ours) in called.items()}
    for count, (theirs, ours) in seen.items():
        rates = [one.rate for one in ours], [one.rate for one in theirs]
        waits = [one.latencies for one in ours], [one.latencies for one in theirs]
        found[f"before.requests_{count}_busy"] = paired(*rates)
        found[f"before.requests_p95_{count}_busy"] = pooled_p95(*waits)
    return found | {f"before.{key}": paired(ours, theirs) for key, (theirs, ours) in started.items()}


def goals(has_amx: bool) -> dict[str, float]:
    """Return the goals that depend on the machine."""
    return {f"before.call_speedup_{rows}_rows": goal for rows, goal in SPEED_UPS[has_amx].items()}


def described(runs: Sequence[Served]) -> Data:
    """Summarise what clients got, over all rounds."""
    latencies = [latency for one in runs for latency in one.latencies]
    rate = len(latencies) / sum(one.seconds for one in runs)
    return {"pictures_per_s": rate, "p95": percentile(latencies, 0.95)}


def report(data: Data) -> list[Piece]:
    if "skipped" in data:
        return [f"Skipped: {data['skipped']}."]
    commit, (before, now) = data["names"][0], data["libraries"]
    table = Table(["busy processes", f"pictures/s, {before}", now, f"p95 s, {before}", now])
    for count, both in data["requests"].items():
        table.add(count, *(number(one[key]) for key in ("pictures_per_s", "p95") for one in both))
    calls = ", ".join(
        f"{rows} {number(was['median'])} and {number(this['median'])}" for rows, (was, this) in data["calls"].items()
    )
    same = "the same checkpoint" if data["same_checkpoint"] else "the checkpoint that it ships, which differ"
    return [
        f"Commit {commit}, with this commit's packages, computes the networks in {before}, this one in {now}; each "
        f"serves {same}. {CLIENTS} clients send one picture's request after the other, beside processes that only "
        "compute ([ratios](#further-goals)):",
        table,
        f"Network calls, by number of rows, in rows/s: {calls}.",
    ]


if __name__ == "__main__":
    main("before", __doc__, measure)
