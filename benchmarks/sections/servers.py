"""The service beside other servers of the same checkpoint: `python -m benchmarks.sections.servers`.

The others are LitServe and FastAPI with one RQ job a request, each twice: with our engine, which shows what the server
costs, and with diffusers' pipeline, which is what a user would otherwise run, at the same network rows. LitServe also
runs it with diffusers' own defaults. All answer the same requests over HTTP with a PNG grid, and take turns; those that
wait are idle. Three loads: a burst of equal requests, for the servers with our engine also a burst of mixed requests,
and for ours and LitServe mixed requests that arrive at random. Each runs on the quiet machine, and beside two processes
that compute all the time, because a service often shares its cores.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import numpy as np
import psutil

from benchmarks import subject
from benchmarks.baselines.drawing import DEFAULT_STEPS, DIFFUSERS, DIFFUSERS_DEFAULTS, ENGINE
from benchmarks.batching import GUIDANCE, SIZES
from benchmarks.busy import busy
from benchmarks.clients import Body, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.stack import WAIT_S, redis_server, stack, start, stop, until
from benchmarks.timing import Deadline, paired, percentile, pooled_p95
from benchmarks.trees import HERE
from service.local.demo import free_port

OURS = "ours"
LITSERVE, RQ = "LitServe, our engine", "FastAPI and RQ, our engine"
LITSERVE_DIFFUSERS, RQ_DIFFUSERS = "LitServe, diffusers", "FastAPI and RQ, diffusers"
LITSERVE_DEFAULTS = "LitServe, diffusers with its defaults"
NAMES = {  # in the names of figures
    LITSERVE: "litserve",
    LITSERVE_DIFFUSERS: "litserve_diffusers",
    RQ: "rq",
    RQ_DIFFUSERS: "rq_diffusers",
    LITSERVE_DEFAULTS: "litserve_defaults",
}
BUSY = {"quiet": 0, "busy": 2}  # condition -> busy processes beside the servers
BURST, MIXED, ARRIVING = "burst", "mixed", "arriving"
MIXED_AT = OURS, LITSERVE, RQ  # diffusers would take minutes
ARRIVING_AT = OURS, LITSERVE  # slower ones would still serve a backlog minutes later
STEPS = 1, 4, 8, 16, 50  # of mixed requests; their sizes and guidance are those of the load section
LOAD = 0.6  # of LitServe's pictures/s in the mixed burst before, at which mixed requests arrive
LIMIT_S = 480.0  # of the rounds
FEWEST_ROUNDS, ROUNDS = 2, 5  # ratios of one round would have no interval
DEFAULTS_BURST = 4  # requests of the burst that diffusers with its defaults gets, one batch: it takes that long
ARRIVING_S = 30.0  # in which mixed requests arrive at random; on a slow machine fewer do
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


Seen = dict[str, dict[str, dict[str, list[Answers]]]]  # condition -> load -> server -> each round's answers


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


def answers(server: Server, bodies: Sequence[Body], at: Sequence[float] = ()) -> Answers:
    """Send the requests all at once, or each at its time."""
    cpu_s, begun = server.cpu_s(), time.perf_counter()
    latencies = send_all(server.port, bodies, len(bodies), ask, at)
    pictures = sum(len(body["labels"]) for body in bodies)
    return Answers(pictures, time.perf_counter() - begun, latencies, server.cpu_s() - cpu_s)


@contextlib.contextmanager
def servers() -> Iterator[dict[str, Server]]:
    """Run all servers, each ready and warm."""
    with contextlib.ExitStack() as running:
        ours = running.enter_context(stack())
        redis = running.enter_context(redis_server())
        environment = HERE.environment(LABELGRID_REDIS_URL=redis.url)

        def begin(*module: str) -> int:
            process = start([f"benchmarks.baselines.{module[0]}", *module[1:]], environment)
            running.callback(end, process)
            return process.pid

        def litserve(drawing: str) -> Server:
            port = free_port()
            return Server(port, (begin("litserve_server", drawing, "--port", str(port)),))

        def rq(drawing: str) -> Server:
            port = free_port()
            api = begin("rq_server", "api", drawing, "--port", str(port))
            return Server(port, (api, begin("rq_server", "worker", drawing)))

        assert ours.api is not None
        assert ours.redis.process is not None
        found = {
            OURS: Server(ours.port, (ours.api.pid, *(worker.pid for worker in ours.workers), ours.redis.process.pid)),
            LITSERVE: litserve(ENGINE),
            LITSERVE_DIFFUSERS: litserve(DIFFUSERS),
            RQ: rq(ENGINE),
            RQ_DIFFUSERS: rq(DIFFUSERS),
            LITSERVE_DEFAULTS: litserve(DIFFUSERS_DEFAULTS),
        }
        for name, server in found.items():
            until(lambda server=server: is_up(server), f"{name} to answer")
            if name in MIXED_AT:
                answers(server, mixed(3, seed=0))
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
    found: dict[str, Server], names: Sequence[str], turn: int, bodies: Sequence[Body], at: Sequence[float] = ()
) -> dict[str, Answers]:
    """Let the servers answer the same requests one after the other; each round begins with another one."""
    first = turn % len(names)
    return {name: answers(found[name], bodies, at) for name in [*names[first:], *names[:first]]}


def one_round(
    found: dict[str, Server], turn: int, same: Sequence[Body], burst: int, arriving: int
) -> dict[str, dict[str, Answers]]:
    """Return the answers to each load by server."""
    taken = {
        BURST: by_server(found, [name for name in found if name != LITSERVE_DEFAULTS], turn, same),
        MIXED: by_server(found, MIXED_AT, turn, mixed(burst, 100 + turn)),
    }
    taken[BURST][LITSERVE_DEFAULTS] = answers(found[LITSERVE_DEFAULTS], same[:DEFAULTS_BURST])
    later = mixed(arriving, 200 + turn)
    pictures = sum(len(body["labels"]) for body in later) / arriving
    apart_s = pictures / (LOAD * taken[MIXED][LITSERVE].rate)
    later = later[: max(FEWEST, int(ARRIVING_S / apart_s))]
    at = np.random.default_rng(turn).exponential(apart_s, len(later)).cumsum().tolist()
    taken[ARRIVING] = by_server(found, ARRIVING_AT, turn, later, at)
    return taken


def measure(quick: bool) -> Data:
    same_size, burst, arriving, rounds = (8, 4, 3, 1) if quick else (32, 8, 12, ROUNDS)
    seen: Seen = {condition: {BURST: {}, MIXED: {}, ARRIVING: {}} for condition in BUSY}
    with servers() as found:
        say(f"  {len(found)} servers are up")
        deadline = Deadline(LIMIT_S)
        same = [{"labels": lists, "seed": i} for i, lists in enumerate(zip(subject.label_lists(same_size)))]
        for turn in deadline.rounds(rounds, at_least=FEWEST_ROUNDS):
            for condition, count in BUSY.items():
                with busy(count):
                    taken = one_round(found, turn, same, burst, arriving)
                for load, by in taken.items():
                    for name, one in by.items():
                        seen[condition][load].setdefault(name, []).append(one)
                say(f"  round {turn + 1}, {condition}, {deadline.spent:.0f} s")
        memory = {name: server.memory_mib() for name, server in found.items()}
    denoiser = subject.denoiser()
    return {
        "figures": figures(seen),
        "loads": {
            condition: {load: {name: described(runs) for name, runs in by.items()} for load, by in loads.items()}
            for condition, loads in seen.items()
        },
        "memory_mib": memory,
        "requests": {
            BURST: same_size,
            MIXED: burst,
            ARRIVING: max(len(one.latencies) for one in seen["quiet"][ARRIVING][OURS]),
        },
        "rounds": len(seen["quiet"][BURST][OURS]),
        "network_rows": sum(subject.network_rows(denoiser.stepper(engine="torch"), denoiser.options)),
    }


def figures(seen: Seen) -> Data:
    """Return the ratios of ours to the others, round by round."""
    found = {}
    for condition, loads in seen.items():
        for load, by in loads.items():
            for other in by.keys() - {OURS}:
                pairs = list(zip(by[OURS], by[other], strict=True))
                key = f"servers.{load}{{}}_vs_{NAMES[other]}_{condition}"
                if load != ARRIVING:  # there the clients set the pace
                    found[key.format("")] = paired([one.rate for one, _ in pairs], [one.rate for _, one in pairs])
                if load != BURST:  # of which all answers come at once
                    waits = [one.latencies for one, _ in pairs], [one.latencies for _, one in pairs]
                    found[key.format("_p95")] = pooled_p95(*waits)
    return dict(sorted(found.items()))


def described(runs: Sequence[Answers]) -> Data:
    """Summarise a server's answers to one load, over all rounds."""
    latencies, pictures = [one for run in runs for one in run.latencies], sum(run.pictures for run in runs)
    quantiles = {f"p{q}": percentile(latencies, q / 100) for q in (50, 95)}
    rate = pictures / sum(run.seconds for run in runs)
    return {"pictures_per_s": rate, **quantiles, "cpu_ms": 1000 * sum(run.cpu_s for run in runs) / pictures}


def shown(found: Data) -> str:
    """Write a ratio with its interval."""
    interval = " to ".join(map(number, found["interval"] or ()))
    return number(found["median"]) + (f" ({interval})" if interval else "")


def report(data: Data) -> list[Piece]:
    found, asked = data["figures"], data["requests"]
    ratios = Table(
        ["ours relative to", "machine", "burst, pictures/s", "mixed, pictures/s", "mixed, p95", "random, p95"]
    )
    for other, name in NAMES.items():
        for condition in BUSY:
            keys = (f"{BURST}_vs", f"{MIXED}_vs", f"{MIXED}_p95_vs", f"{ARRIVING}_p95_vs")
            cells = (found.get(f"servers.{key}_{name}_{condition}") for key in keys)
            ratios.add(other, titled(condition), *(shown(one) if one else "" for one in cells))
    table = Table(["machine", "load", "server", "pictures/s", "p50 s", "p95", "CPU, ms a picture"])
    titles = {
        BURST: f"burst: {asked[BURST]} requests of one picture at once",
        MIXED: f"mixed: {asked[MIXED]} requests at once",
        ARRIVING: f"random: {asked[ARRIVING]} mixed requests, one after the other",
    }
    for condition, loads in data["loads"].items():
        for load, by in loads.items():
            for name, one in by.items():
                cells = (number(one[key]) for key in ("pictures_per_s", "p50", "p95", "cpu_ms"))
                table.add(titled(condition), titles[load], name, *cells)
    memory = ", ".join(f"{name} {number(mib)}" for name, mib in data["memory_mib"].items())
    steps = ", ".join(map(str, STEPS[:-1]))
    return [
        "LitServe batches up to eight requests, as its documentation shows. *FastAPI and RQ* has one job a request. "
        "With *our engine* they sample with the same loop and networks as the service, so the ratio is what the server "
        "costs. With *diffusers* they run the same network and weights as a diffusers model in its own loop, with its "
        "DPM-Solver++, in bfloat16 where the CPU has it. Steps and guidance are the same in all of these, so they "
        f"compute the same network rows: {data['network_rows']} for a picture of the burst. *With its defaults* means "
        f"float32 and {DEFAULT_STEPS} guided steps, {2 * DEFAULT_STEPS} network rows: what its documentation leads to. "
        f"This one gets only {DEFAULTS_BURST} requests of the burst, as one batch. Every server judges each picture "
        "and answers with the grid; only ours also keeps results, verdicts and recipes.",
        f"{data['rounds']} rounds. A mixed request has 1 to 8 pictures, {steps} or {STEPS[-1]} steps and guidance 1 "
        f"or 3. Those at random times arrive at {LOAD} of the pictures/s that LitServe made of mixed ones just before. "
        f"The busy machine runs {BUSY['busy']} processes besides that only compute. Medians, with 95 % intervals:",
        ratios,
        table,
        f"Memory that a server does not share with others, MiB: {memory}.",
    ]


def titled(condition: str) -> str:
    """Name a condition for readers."""
    return f"beside {BUSY[condition]} busy processes" if BUSY[condition] else condition


if __name__ == "__main__":
    main("servers", __doc__, measure)
