"""The service beside other servers of the same checkpoint: `python -m benchmarks.sections.servers`.

`servers.py` and `litserve_server.py` in `benchmarks/baselines` are the others. All answer the same requests over HTTP
with a PNG grid, and take turns; those that wait are idle. Three loads: equal requests from clients that send the next
one after an answer, a burst of mixed requests, and mixed requests that arrive at random. Our loop takes turns with
them: it samples, judges and encodes the same pictures without a server, which is about the most a server can reach.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import subject
from benchmarks.baselines.servers import Drawing, Request
from benchmarks.batching import GUIDANCE, SIZES
from benchmarks.clients import Body, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import STORAGE, Data, main, say
from benchmarks.stack import WAIT_S, stack, start, stop, until
from benchmarks.timing import Deadline, paired, percentile, pooled_p95
from service.local.demo import free_port
from service.local.redis_server import RedisServer

OURS, LITSERVE, NAIVE, DIFFUSERS = "ours", "LitServe", "FastAPI and RQ", "diffusers and FastAPI"
LOOP = "our loop, without a server"
CLIENTS = 16  # of the equal requests
STEPS = 1, 4, 8, 16, 50  # of mixed requests; their sizes and guidance are those of the load section
LOAD = 0.6  # of LitServe's pictures/s in a burst, at which mixed requests arrive
LIMIT_S = 750.0
SLOW, SLOW_ROUNDS = (NAIVE, DIFFUSERS), 2  # these take part in so many rounds: they take half of a round's time
ARRIVING_S = 60.0  # in which mixed requests arrive at random; on a slow machine fewer do
FEWEST = 6
HEADERS = {"Content-Type": "application/json", "Accept": "image/png", "Prefer": f"wait={WAIT_S}"}
PNG = b"\x89PNG"


@dataclass(frozen=True)
class Server:
    """A running server: where it answers, and its processes."""

    port: int
    pids: tuple[int, ...]

    def _processes(self) -> list[psutil.Process]:
        own = [psutil.Process(pid) for pid in self.pids]
        return own + [child for one in own for child in one.children(recursive=True)]

    def cpu_s(self) -> float:
        """Return the CPU seconds of its processes so far."""
        return sum(sum(one.cpu_times()[:2]) for one in self._processes())

    def memory_mib(self) -> float:
        """Return the memory that its processes do not share with others."""
        return sum(one.memory_full_info().uss for one in self._processes()) / 2**20


@dataclass(frozen=True)
class Answers:
    """What a load gave; `seconds` last until the last answer, `cpu_s` is that of the server."""

    pictures: int
    seconds: float
    latencies: list[float]
    cpu_s: float

    @property
    def rate(self) -> float:
        return self.pictures / self.seconds


def mixed(count: int, seed: int) -> list[dict[str, Any]]:
    """Draw the bodies of `count` mixed requests."""
    dice = np.random.default_rng(seed)
    bodies = []
    for number_ in range(count):
        lists = subject.label_lists(int(dice.choice(SIZES)), seed=1000 * seed + number_)
        options = {"steps": int(dice.choice(STEPS)), "guidance": float(dice.choice(GUIDANCE))}
        bodies.append({"labels": lists, "seed": number_, **options})
    return bodies


def ask(connection: HTTPConnection, body: Body) -> None:
    """Send a request and read its grid. RuntimeError for anything else."""
    connection.request("POST", "/generate", json.dumps(body), HEADERS)
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200 or not content.startswith(PNG):
        raise RuntimeError(f"POST /generate returned {answer.status}: {content[:300]!r}")


def answers(server: Server, bodies: Sequence[Body], clients: int, at: Sequence[float] = ()) -> Answers:
    """Let `clients` send the requests, each not before its time `at` if there is one."""
    cpu_s, begun = server.cpu_s(), time.perf_counter()
    latencies = send_all(server.port, bodies, clients, ask, at)
    pictures = sum(len(body["labels"]) for body in bodies)
    return Answers(pictures, time.perf_counter() - begun, latencies, server.cpu_s() - cpu_s)


@contextlib.contextmanager
def servers(batch: int, rows: int) -> Iterator[dict[str, Server]]:
    """Run all servers, each ready and warm."""
    with contextlib.ExitStack() as running, tempfile.TemporaryDirectory(prefix="lg-bench-") as folder:
        ours = running.enter_context(stack())  # its worker measures the sizes itself, as for users
        redis = RedisServer(Path(folder))
        redis.start()
        running.callback(redis.stop)
        both = {"LABELGRID_BATCH_PICTURES": str(batch), "LABELGRID_BATCH_ROWS": str(rows)}
        environment = {**os.environ, **both, "LABELGRID_REDIS_URL": redis.url, "LABELGRID_STORAGE": str(STORAGE)}

        def begin(*module: str) -> int:
            process = start([f"benchmarks.baselines.{module[0]}", *module[1:]], environment)
            running.callback(end, process)
            return process.pid

        def serve(*module: str) -> Server:
            port = free_port()
            return Server(port, (begin(*module, "--port", str(port)),))

        assert ours.api is not None
        assert redis.process is not None
        assert ours.redis.process is not None
        found = {
            OURS: Server(ours.port, (ours.api.pid, *(worker.pid for worker in ours.workers), ours.redis.process.pid)),
            LITSERVE: serve("litserve_server"),
            NAIVE: serve("servers", "naive"),
            DIFFUSERS: serve("servers", "diffusers"),
        }
        found[NAIVE] = replace(
            found[NAIVE], pids=(*found[NAIVE].pids, begin("servers", "naive-worker"), redis.process.pid)
        )
        for name, server in found.items():
            until(lambda server=server: is_up(server), f"{name} to answer")
            answers(server, mixed(3, seed=0), clients=3)
        yield found


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server, and what it leaves running: LitServe's workers outlive it."""
    children = psutil.Process(process.pid).children(recursive=True)
    stop(process)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def is_up(server: Server) -> bool:
    with contextlib.suppress(OSError):
        ask(HTTPConnection("127.0.0.1", server.port), {"labels": [["red cube"]], "steps": 1})
        return True
    return False


def by_server(
    found: dict[str, Server], turn: int, bodies: Sequence[Body], clients: int, at: Sequence[float] = ()
) -> dict[str, Answers]:
    """Let the servers answer the same requests one after the other; each round begins with another one."""
    names, first = list(found), turn % len(found)
    return {name: answers(found[name], bodies, clients, at) for name in names[first:] + names[:first]}


def without_server(drawing: Drawing, bodies: Sequence[Body], at_once: int) -> Answers:
    """Sample, judge and encode the pictures of `at_once` requests at a time."""
    requests, cpu_s, begun = [Request.model_validate(body) for body in bodies], time.process_time(), time.perf_counter()
    latencies = []
    for first in range(0, len(requests), at_once):
        drawing(requests[first : first + at_once])
        latencies.append(time.perf_counter() - begun)
    pictures = sum(len(request.labels) for request in requests)
    return Answers(pictures, time.perf_counter() - begun, latencies, time.process_time() - cpu_s)


def alone(drawing: Drawing, bodies: Sequence[Body]) -> Answers:
    """Make the pictures request by request, each with the machine to itself: no server can answer it sooner."""
    runs = [without_server(drawing, [body], 1) for body in bodies]
    latencies = [one.seconds for one in runs]
    return Answers(sum(one.pictures for one in runs), sum(latencies), latencies, sum(one.cpu_s for one in runs))


def measure(quick: bool) -> Data:
    equal, burst, arriving, rounds = (8, 4, 3, 1) if quick else (48, 12, 12, 8)
    drawing = Drawing()
    sizes = subject.batch_sizes(drawing.denoiser)
    deadline = Deadline(LIMIT_S)
    seen: dict[str, dict[str, list[Answers]]] = {"equal": {}, "burst": {}, "arriving": {}}
    with servers(sizes.pictures, sizes.rows) as found:
        say(f"  four servers are up, {deadline.spent:.0f} s")
        same = [{"labels": lists, "seed": i} for i, lists in enumerate(zip(subject.label_lists(equal)))]
        for turn in deadline.rounds(rounds):
            at_once, later = mixed(burst, 100 + turn), mixed(arriving, 200 + turn)
            asked = {name: one for name, one in found.items() if turn < SLOW_ROUNDS or name not in SLOW}
            taken = {
                "equal": by_server(asked, turn, same, CLIENTS),
                "burst": by_server(asked, turn, at_once, burst),
            }
            taken["equal"][LOOP] = without_server(drawing, same, CLIENTS)
            taken["burst"][LOOP] = without_server(drawing, at_once, burst)
            pictures = sum(len(body["labels"]) for body in later) / arriving
            apart_s = pictures / (LOAD * taken["burst"][LITSERVE].rate)
            later = later[: max(FEWEST, int(ARRIVING_S / apart_s))]
            at = np.random.default_rng(turn).exponential(apart_s, len(later)).cumsum().tolist()
            both = {name: found[name] for name in (OURS, LITSERVE)}
            taken["arriving"] = by_server(both, turn, later, len(later), at)
            taken["arriving"][LOOP] = alone(drawing, later)
            for load, by in taken.items():
                for name, one in by.items():
                    seen[load].setdefault(name, []).append(one)
            say(f"  round {turn + 1}, {deadline.spent:.0f} s")
        memory = {name: server.memory_mib() for name, server in found.items()}
    return {
        "figures": figures(seen),
        "loads": {load: {name: described(runs) for name, runs in by.items()} for load, by in seen.items()},
        "memory_mib": memory,
        "requests": {
            "equal": equal,
            "burst": burst,
            "arriving": max(len(one.latencies) for one in seen["arriving"][OURS]),
        },
        "rounds": len(seen["equal"][OURS]),
    }


def figures(seen: dict[str, dict[str, list[Answers]]]) -> Data:
    """Return the ratios between ours and the others, round by round."""

    def faster(load: str, name: str, other: str) -> Data:
        """Return the ratio of their pictures/s in the rounds that both took part in."""
        both = list(zip(seen[load][name], seen[load][other], strict=False))
        return paired([one.rate for one, _ in both], [one.rate for _, one in both])

    def latencies(name: str) -> list[list[float]]:
        return [one.latencies for one in seen["arriving"][name]]

    return {
        "servers.uniform_throughput_vs_litserve": faster("equal", OURS, LITSERVE),
        "servers.uniform_throughput_vs_naive": faster("equal", OURS, NAIVE),
        "servers.uniform_throughput_vs_diffusers": faster("equal", OURS, DIFFUSERS),
        "servers.uniform_bound_vs_litserve": faster("equal", LOOP, LITSERVE),
        "servers.uniform_bound_vs_naive": faster("equal", LOOP, NAIVE),
        "servers.mixed_throughput_vs_litserve": faster("burst", OURS, LITSERVE),
        "servers.mixed_throughput_vs_naive": faster("burst", OURS, NAIVE),
        "servers.mixed_throughput_vs_diffusers": faster("burst", OURS, DIFFUSERS),
        "servers.mixed_bound_vs_litserve": faster("burst", LOOP, LITSERVE),
        "servers.mixed_bound_vs_naive": faster("burst", LOOP, NAIVE),
        "servers.mixed_p95_vs_litserve": pooled_p95(latencies(OURS), latencies(LITSERVE)),
        "servers.mixed_p95_bound_vs_litserve": pooled_p95(latencies(LOOP), latencies(LITSERVE)),
    }


def described(runs: Sequence[Answers]) -> Data:
    """Summarise a server's answers to one load, over all rounds."""
    latencies, pictures = [one for run in runs for one in run.latencies], sum(run.pictures for run in runs)
    quantiles = {f"p{q}": percentile(latencies, q / 100) for q in (50, 95, 99)}
    rate = pictures / sum(run.seconds for run in runs)
    return {"pictures_per_s": rate, **quantiles, "cpu_ms": 1000 * sum(run.cpu_s for run in runs) / pictures}


def report(data: Data) -> list[Piece]:
    asked, table = data["requests"], Table(["load", "server", "pictures/s", "p50 s", "p95", "p99", "CPU, ms a picture"])
    titles = {
        "equal": f"{asked['equal']} equal requests of one picture, {CLIENTS} clients",
        "burst": f"{asked['burst']} mixed requests at once",
        "arriving": f"{asked['arriving']} mixed requests, at random times",
    }
    for load, by in data["loads"].items():
        for name, one in by.items():
            cells = (number(one[key]) for key in ("pictures_per_s", "p50", "p95", "p99", "cpu_ms"))
            table.add(titles[load], name, *cells)
    memory = ", ".join(f"{name} {number(mib)}" for name, mib in data["memory_mib"].items())
    steps = ", ".join(map(str, STEPS[:-1]))
    return [
        f"{data['rounds']} rounds, of which *FastAPI and RQ* and *diffusers and FastAPI* took part in at most "
        f"{SLOW_ROUNDS}. Every server has one process that samples, judges each picture and answers with the "
        "grid. LitServe batches requests; it and *FastAPI and RQ*, with one job a request, sample with our loop, and "
        "*diffusers and FastAPI* with diffusers' DPM-Solver++. Only our service also keeps results, verdicts and "
        "recipes. Our loop without a server samples, judges and encodes the same pictures, about the most that a "
        "server can reach; at random times it has each request for itself. A mixed request has 1 to 8 "
        f"pictures, {steps} or {STEPS[-1]} steps and guidance 1 or 3. Those at random times arrive at {LOAD} of the "
        "pictures/s that LitServe made in the burst before.",
        table,
        f"Memory that a server does not share with others, MiB: {memory}.",
    ]


if __name__ == "__main__":
    main("servers", __doc__, measure)
