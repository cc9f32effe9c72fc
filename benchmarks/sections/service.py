"""The service compared with its bare sampling loop: `python -m benchmarks.sections.service`.

Throughput with 32 clients, each with one open request of one picture or eight, relative to the loop at the worker's
batch size; of the promoted model, of the one of several steps and of the small one-step model. Beside them a worker's
engine by itself, which judges and encodes pictures as well: what it lacks of the loop is the evaluator's and the PNGs',
and what the service lacks of it is HTTP's, Redis' and storage's. Latency of one picture over HTTP on an idle service,
relative to the loop for one picture. Service, engine and loop take turns; while one works, the others sleep. A loop, in
batches of AT_ONCE pictures as a worker's on a CPU, is timed before and after the service.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection

from benchmarks import subject
from benchmarks.clients import Body, generate, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.stack import WAIT_S, Stack, cpu_s, stack
from benchmarks.subject import AT_ONCE
from benchmarks.timing import Deadline, figure, paired, seconds
from service.contract.options import PictureOptions
from service.contract.records import Picture
from service.settings import Settings
from service.worker.engine import Engine
from service.worker.models import ON_CPU
from shared.diffusion.denoise import Stepper, sample
from shared.diffusion.model import Denoiser
from shared.evaluator import Judge, cropping_judge
from shared.options import SamplingOptions

CLIENTS = 32
SEVERAL = 8  # pictures per larger request
ROUNDS_S = 150.0  # a slow machine takes fewer rounds


def post(connection: HTTPConnection, body: Body) -> None:
    """Send a request and wait until its job is finished. RuntimeError if it does not finish."""
    job = json.loads(generate(connection, body, {"Prefer": f"wait={WAIT_S}"}))
    if job["status"] != "finished":
        raise RuntimeError(f"POST /generate returned {job}")


def saturate(port: int, requests: int, size: int = 1, model: str | None = None) -> float:
    """Return the pictures/s of CLIENTS clients; each sends its next request, of `size` pictures, after an answer."""
    lists = subject.label_lists(requests * size)
    bodies = [{"labels": lists[i * size : (i + 1) * size], "seed": i, "model": model} for i in range(requests)]
    return requests * size / seconds(lambda: send_all(port, bodies, CLIENTS, post))


def cpu_ms(running: Stack, requests: int) -> tuple[float, dict[str, float]]:
    """Return the pictures/s at saturation, and each process's CPU time in ms per picture."""
    before = {name: cpu_s(pid) for name, pid in running.pids().items()}
    rate = saturate(running.port, requests)
    return rate, {name: (cpu_s(pid) - before[name]) / requests * 1000 for name, pid in running.pids().items()}


def bare(stepper: Stepper, options: SamplingOptions, count: int) -> Callable[[], float]:
    """Return a measurement of the loop's pictures/s in batches, without evaluator, PNGs and Redis."""
    lists, seeds = subject.label_lists(count), subject.seeds(count)
    hot = subject.multi_hot(lists, subject.ICLEVR)

    def run() -> float:
        begun = time.perf_counter()
        for first in range(0, count, AT_ONCE):
            part = slice(first, first + AT_ONCE)
            sample(stepper, hot[part], options, seeds[part])
        return count / (time.perf_counter() - begun)

    return run


def judged(stepper: Stepper, options: SamplingOptions, judge: Judge, count: int) -> Callable[[], float]:
    """Return a measurement of the pictures/s of a worker's engine, which also judges and encodes them."""
    engine, given = Engine(stepper, subject.ICLEVR, judge, ON_CPU), PictureOptions(**options.model_dump())
    pictures = [
        Picture(job=str(i), index=0, labels=tuple(labels), seed=seed, options=given)
        for i, (labels, seed) in enumerate(zip(subject.label_lists(count), subject.seeds(count), strict=True))
    ]

    def run() -> float:
        begun, waiting, ended = time.perf_counter(), list(pictures), 0
        while ended < count:
            joining, waiting = waiting[: engine.room], waiting[engine.room :]
            engine.admit(joining)
            ended += len(engine.step())
        return count / (time.perf_counter() - begun)

    return run


@dataclass
class Beside:
    """The pictures/s, by round, of the service with one model, of a worker's engine by itself, and of the bare loop."""

    serve: Callable[[], float]
    engine: Callable[[], float]
    loop: Callable[[], float]

    def __post_init__(self) -> None:
        self.served, self.by_engine, self.by_loop = list[float](), list[float](), list[float]()

    def measure(self) -> None:
        """Measure a round; the loop is timed before and after the service."""
        before = self.loop()
        self.served.append(self.serve())
        self.by_engine.append(self.engine())
        self.by_loop.append((before + self.loop()) / 2)


def measure(quick: bool) -> Data:
    requests, larger, rounds, singles = (16, 8, 1, 3) if quick else (96, CLIENTS, 5, 15)
    count = AT_ONCE if quick else 4 * AT_ONCE
    ours, in_steps, distilled, settings = subject.promoted(), subject.in_steps(), subject.distilled(), Settings()
    evaluator, stepper = subject.evaluator(), ours.stepper()

    def loops(denoiser: Denoiser, own: Stepper, count: int) -> tuple[Callable[[], float], Callable[[], float]]:
        judge = cropping_judge(evaluator, denoiser.aspect)
        return judged(own, denoiser.options, judge, count), bare(own, denoiser.options, count)

    engine, loop = loops(ours, stepper, count)
    with stack(LABELGRID_LOADED_MODELS="3") as running:
        say("  the service is up")
        spent = list[dict[str, float]]()

        def serve() -> float:
            rate, by_process = cpu_ms(running, requests)
            spent.append(by_process)
            return rate

        one_each = Beside(serve, engine, loop)
        several = Beside(partial(saturate, running.port, larger, size=SEVERAL), engine, loop)
        steps = Beside(
            partial(saturate, running.port, requests, model=subject.IN_STEPS),
            *loops(in_steps, in_steps.stepper(), count),
        )
        one_step = Beside(
            partial(saturate, running.port, larger, size=SEVERAL, model=subject.DISTILLED),
            *loops(distilled, distilled.stepper(), 3 * count),
        )
        for model, way in (None, one_each), (subject.IN_STEPS, steps), (subject.DISTILLED, one_step):
            for _ in range(2):  # networks of larger batches are compiled beside the first calls
                saturate(running.port, AT_ONCE, model=model)
                way.engine()
                way.loop()
        loop_ms = list[float]()
        for _ in Deadline(ROUNDS_S).rounds(rounds):
            begun = cpu_s(os.getpid())
            loop()
            loop_ms.append((cpu_s(os.getpid()) - begun) / count * 1000)
            for way in one_each, several, steps, one_step:
                way.measure()
        say(f"  {requests} requests of {CLIENTS} clients against the bare loop, {len(loop_ms)} rounds: done")
        end_to_end, one = [], []
        hot = subject.multi_hot(subject.label_lists(1), ours.vocabulary)
        with contextlib.closing(HTTPConnection("127.0.0.1", running.port)) as client:
            for number_ in range(singles + 1):
                body = {"labels": subject.label_lists(1), "seed": number_}
                end_to_end.append(seconds(lambda body=body: post(client, body)))
                one.append(seconds(lambda: sample(stepper, hot, ours.options, [1])))
    end_to_end, one = end_to_end[1:], one[1:]
    ways = {"one_each": one_each, "several": several, "steps": steps, "one_step": one_step}
    return {
        "figures": {
            "service.saturation_fraction": paired(one_each.served, one_each.by_loop),
            "service.saturation_fraction_several": paired(several.served, several.by_loop),
            "service.steps_fraction": paired(steps.served, steps.by_loop),
            "service.one_step_fraction": paired(one_step.served, one_step.by_loop),
            "service.pictures_per_s": figure(one_each.served),
            "service.cpu_ms_beside_loop": figure(
                sum(one.values()) - ms for one, ms in zip(spent, loop_ms, strict=True)
            ),
            "service.api_cpu_ms_per_request": figure(one["API"] for one in spent),
            "service.single_overhead_ms": figure((a - b) * 1000 for a, b in zip(end_to_end, one, strict=True)),
            "service.single_ratio": paired(end_to_end, one),
        },
        "rates": {
            name: {
                "served": figure(way.served),
                "engine": figure(way.by_engine),
                "loop": figure(way.by_loop),
                "of_engine": paired(way.served, way.by_engine),
                "of_loop": paired(way.served, way.by_loop),
            }
            for name, way in ways.items()
        },
        "single_ms": figure(s * 1000 for s in end_to_end),
        "single_loop_ms": figure(s * 1000 for s in one),
        "batch": AT_ONCE,
        "served_rows": subject.network_rows(stepper, ours.options),
        "cpu_ms": {name: figure(one[name] for one in spent) for name in spent[0]},
        "loop_cpu_ms": figure(loop_ms),
        "kept_s": settings.keep_s,
        "requests": requests,
        "singles": singles,
        "goal_ms": figure(b * 150 + 10 for b in one),
    }


def report(data: Data) -> list[Piece]:
    figures = data["figures"]
    table = Table(["measurement", "service", "engine", "bare loop", "of the engine", "of the loop"])
    for name, requests in (
        ("one_each", "1 picture per request"),
        ("several", f"{SEVERAL} pictures per request"),
        ("steps", f"1 picture per request, `{subject.IN_STEPS}`"),
        ("one_step", f"{SEVERAL} pictures per request, `{subject.DISTILLED}`"),
    ):
        rates = {key: found["median"] for key, found in data["rates"][name].items()}
        table.add(
            f"pictures/s, {CLIENTS} clients, batches of {data['batch']}, {requests}",
            *(number(rates[key]) for key in ("served", "engine", "loop")),
            *(f"{rates[key]:.3f}" for key in ("of_engine", "of_loop")),
        )
    table.add(
        "one picture on an idle service, ms",
        number(data["single_ms"]["median"]),
        "",
        number(data["single_loop_ms"]["median"]),
        "",
        f"{figures['service.single_ratio']['median']:.3f}",
    )
    overhead = figures["service.single_overhead_ms"]["median"]
    allowed = data["goal_ms"]["median"]
    return [
        "The service answers over HTTP with verdicts, PNGs and grids. *Engine* is that of a worker in a process of its "
        "own, which judges and encodes the pictures, without HTTP, Redis and storage; the bare loop only samples. "
        f"{data['rates']['one_each']['served']['n']} rounds of {data['requests']} requests, {data['singles']} single "
        f"pictures. A single picture takes {number(overhead)} ms more than the loop; the goal, 10 ms and 0.15 of the "
        f"loop's time, is {number(allowed)}.",
        table,
        where_the_cpu_goes(data),
    ]


def where_the_cpu_goes(data: Data) -> str:
    parts = ", ".join(f"{name} {number(ms['median'])}" for name, ms in data["cpu_ms"].items())
    whole, loop_ms = sum(ms["median"] for ms in data["cpu_ms"].values()), data["loop_cpu_ms"]["median"]
    return (
        f"CPU time at saturation, 1 picture per request: {number(whole)} ms a picture ({parts}); the bare loop takes "
        f"{number(loop_ms)} ms."
    )


if __name__ == "__main__":
    main("service", __doc__, measure)
