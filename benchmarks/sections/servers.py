"""The service beside other servers of the same checkpoint: `python -m benchmarks.sections.servers`.

The others are LitServe and FastAPI with one RQ job a request, each twice: with our engine, which shows what the server
costs, and with diffusers' pipeline, which is what a user would otherwise run, at the same network rows. LitServe also
runs it with diffusers' own defaults. Each runs beside ours alone. The two answer the same requests over HTTP with a PNG
grid, in turn. Three loads: a burst of equal requests, for the servers with our engine also a burst of mixed requests,
and for LitServe mixed requests that arrive at random. Each load comes on the quiet machine, and beside two processes
that compute all the time, because a service often shares its cores.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks import subject
from benchmarks.baselines.drawing import DEFAULT_STEPS, DIFFUSERS, DIFFUSERS_DEFAULTS, ENGINE
from benchmarks.batching import GUIDANCE, SIZES
from benchmarks.busy import busy
from benchmarks.clients import Body, generate, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.stack import WAIT_S, redis_server, stack
from benchmarks.timing import order, paired, pooled_p95
from faults.harness import start, until
from service.local.demo import free_port
from service.local.redis_server import stop

LITSERVE, RQ = "LitServe, our engine", "FastAPI and RQ, our engine"
LITSERVE_DIFFUSERS, RQ_DIFFUSERS = "LitServe, diffusers", "FastAPI and RQ, diffusers"
LITSERVE_DEFAULTS = "LitServe, diffusers with its defaults"
BUSY = {"quiet": 0, "busy": 2}  # condition -> busy processes beside the servers
BURST, MIXED, ARRIVING = "burst", "mixed", "arriving"


class Other(NamedTuple):
    """A server beside ours: its name in those of figures, what it draws with, its loads, and requests of its burst.

    diffusers would take minutes for mixed requests, and a slow server still has a backlog when others begin.
    """

    key: str
    drawing: str
    loads: tuple[str, ...]
    burst: int


OTHERS = {
    LITSERVE: Other("litserve", ENGINE, (BURST, MIXED, ARRIVING), 32),
    LITSERVE_DIFFUSERS: Other("litserve_diffusers", DIFFUSERS, (BURST,), 8),
    RQ: Other("rq", ENGINE, (BURST, MIXED), 32),
    RQ_DIFFUSERS: Other("rq_diffusers", DIFFUSERS, (BURST,), 8),
    LITSERVE_DEFAULTS: Other("litserve_defaults", DIFFUSERS_DEFAULTS, (BURST,), 4),
}
STEPS = 1, 4, 8, 16, 50  # of mixed requests; their sizes and guidance are those of the load section
LOAD = 0.6  # of LitServe's pictures/s in the mixed burst before, at which mixed requests arrive
# In which mixed requests arrive at random; on a slow machine fewer do. The p95 of a dozen is that of the largest one.
ARRIVING_S = 60.0
FEWEST = 6
ROUNDS = 4
PNG = b"\x89PNG"


@dataclass(frozen=True)
class Answers:
    """What a load gave; `seconds` last until the last answer."""

    pictures: int
    seconds: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        return self.pictures / self.seconds


Seen = dict[str, dict[str, dict[str, list[list[Answers]]]]]  # other -> condition -> load -> ours and theirs by round


def mixed(count: int, seed: int) -> list[dict[str, Any]]:
    """Draw the bodies of `count` mixed requests."""
    dice = np.random.default_rng(seed)
    bodies = []
    for number_ in range(count):
        lists = subject.label_lists(int(dice.choice(SIZES)), seed=1000 * seed + number_)
        options = {"steps": int(dice.choice(STEPS)), "guidance": float(dice.choice(GUIDANCE))}
        bodies.append({"labels": lists, "seed": number_, "model": subject.IN_STEPS, **options})
    return bodies


def ask(connection: HTTPConnection, body: Body) -> None:
    """Send a request and read its grid. RuntimeError for anything else."""
    content = generate(connection, body, {"Accept": "image/png", "Prefer": f"wait={WAIT_S}"})
    if not content.startswith(PNG):
        raise RuntimeError(f"POST /generate returned {content[:300]!r}")


def answers(port: int, bodies: Sequence[Body], at: Sequence[float] = ()) -> Answers:
    """Send the requests all at once, or each at its time."""
    begun = time.perf_counter()
    latencies = send_all(port, bodies, len(bodies), ask, at)
    pictures = sum(len(body["labels"]) for body in bodies)
    return Answers(pictures, time.perf_counter() - begun, latencies)


@contextlib.contextmanager
def started(name: str) -> Iterator[int]:
    """Run another server, ready and warm, and yield its port. No other runs beside it: those that wait poll."""
    with contextlib.ExitStack() as running:
        redis = running.enter_context(redis_server())
        environment, port = {**os.environ, "LABELGRID_REDIS_URL": redis.url}, free_port()

        def begin(*module: str) -> None:
            process = start([f"benchmarks.baselines.{module[0]}", *module[1:]], environment)
            running.callback(end, process)

        drawing = OTHERS[name].drawing
        if name in (RQ, RQ_DIFFUSERS):
            begin("rq_server", "api", drawing, "--port", str(port))
            begin("rq_server", "worker", drawing)
        else:
            begin("litserve_server", drawing, "--port", str(port))
        until(lambda: is_up(port), f"{name} to answer")
        if MIXED in OTHERS[name].loads:
            answers(port, mixed(3, seed=0))
        yield port


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server, and what it leaves running: LitServe's workers outlive it."""
    children = psutil.Process(process.pid).children(recursive=True)
    stop(process)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def is_up(port: int) -> bool:
    with contextlib.suppress(OSError):
        ask(HTTPConnection("127.0.0.1", port), {"labels": [["red cube"]], "steps": 1, "model": subject.IN_STEPS})
        return True
    return False


def one_round(pair: Sequence[int], name: str, turn: int, quick: bool) -> dict[str, list[Answers]]:
    """Let ours and the server `name`, at these ports, answer the same requests in turn. Return the answers by load."""
    count, burst, arriving = (4, 4, 3) if quick else (OTHERS[name].burst, 8, 40)

    def both(bodies: Sequence[Body], at: Sequence[float] = ()) -> list[Answers]:
        taken = {place: answers(pair[place], bodies, at) for place in order(turn)}
        return [taken[place] for place in range(2)]

    lists = list(zip(subject.label_lists(count)))
    same = [{"labels": one, "seed": i, "model": subject.IN_STEPS} for i, one in enumerate(lists)]
    taken = {BURST: both(same)}
    if MIXED in OTHERS[name].loads:
        taken[MIXED] = both(mixed(burst, 100 + turn))
    if ARRIVING in OTHERS[name].loads:
        later = mixed(arriving, 200 + turn)
        pictures = sum(len(body["labels"]) for body in later) / arriving
        apart_s = pictures / (LOAD * taken[MIXED][1].rate)
        later = later[: max(FEWEST, int(ARRIVING_S / apart_s))]
        at = np.random.default_rng(turn).exponential(apart_s, len(later)).cumsum().tolist()
        taken[ARRIVING] = both(later, at)
    return taken


def measure(quick: bool) -> Data:
    seen: Seen = {name: {one: {load: [] for load in other.loads} for one in BUSY} for name, other in OTHERS.items()}
    with stack() as running:
        answers(running.port, mixed(3, seed=0))
        for name in OTHERS:
            with started(name) as other:
                for turn in range(1 if quick else ROUNDS):
                    for condition, count in BUSY.items():
                        with busy(count):
                            taken = one_round((running.port, other), name, turn, quick)
                        for load, two in taken.items():
                            seen[name][condition][load].append(two)
                    say(f"  {name}, round {turn + 1}")
    denoiser = subject.in_steps()
    return {
        "figures": figures(seen),
        "rounds": len(seen[LITSERVE]["quiet"][BURST]),
        "network_rows": sum(subject.network_rows(denoiser.stepper(engine="torch"), denoiser.options)),
    }


def figures(seen: Seen) -> Data:
    """Return the ratios of ours to the others, round by round."""
    found = {}
    for name, conditions in seen.items():
        for condition, loads in conditions.items():
            for load, rounds in loads.items():
                key = f"servers.{load}{{}}_vs_{OTHERS[name].key}_{condition}"
                ours, theirs = zip(*rounds, strict=True)
                if load != ARRIVING:  # there the clients set the pace
                    found[key.format("")] = paired([one.rate for one in ours], [one.rate for one in theirs])
                if load != BURST:  # of which all answers come at once
                    waits = [one.latencies for one in ours], [one.latencies for one in theirs]
                    found[key.format("_p95")] = pooled_p95(*waits)
    return dict(sorted(found.items()))


def shown(found: Data) -> str:
    """Write a ratio with its interval."""
    interval = " to ".join(map(number, found["interval"] or ()))
    return number(found["median"]) + (f" ({interval})" if interval else "")


def report(data: Data) -> list[Piece]:
    found = data["figures"]
    measures = (f"{BURST}_vs", f"{MIXED}_vs", f"{ARRIVING}_p95_vs")
    header = [f"{what}, {condition}" for what in ("burst", "mixed", "random, p95") for condition in BUSY]
    ratios = Table(["ours relative to", *header])
    for name, other in OTHERS.items():
        cells = (found.get(f"servers.{key}_{other.key}_{condition}") for key in measures for condition in BUSY)
        ratios.add(name, *(shown(one) if one else "" for one in cells))
    steps = ", ".join(map(str, STEPS[:-1]))
    return [
        "LitServe batches up to eight requests, as its documentation shows; *FastAPI and RQ* has one job a request. "
        "*Our engine* is the service's loop and networks, *diffusers* its own loop with its DPM-Solver++, in bfloat16 "
        f"where the CPU has it. All compute the same network rows, {data['network_rows']} for a picture of the burst, "
        f"except *with its defaults*: float32 and {2 * DEFAULT_STEPS} rows. All judge each picture and answer with the "
        "grid; only ours keeps them.",
        f"A burst has {OTHERS[LITSERVE].burst} requests of one picture at once, with diffusers "
        f"{OTHERS[LITSERVE_DIFFUSERS].burst}, with its defaults {OTHERS[LITSERVE_DEFAULTS].burst}. Mixed requests, "
        f"eight at once, have 1 to 8 pictures, {steps} or {STEPS[-1]} steps and guidance 1 or 3; random ones are "
        f"mixed, and arrive one by one at {LOAD} of LitServe's pictures/s. A busy machine runs {BUSY['busy']} "
        f"processes that only compute. Ours and one other take turns, {data['rounds']} rounds. "
        "Our pictures/s (or p95) over theirs, medians with 95 % intervals:",
        ratios,
    ]


if __name__ == "__main__":
    main("servers", __doc__, measure)
