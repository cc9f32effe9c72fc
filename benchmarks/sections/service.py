"""The service compared with its bare sampling loop: `python -m benchmarks.sections.service`.

Throughput with 32 clients, each with one open request of one picture or eight, relative to the loop at the worker's
batch size; of the promoted model, of the one of several steps and of the small one-step model. Latency of one picture
over HTTP on an idle service, relative to the loop for one picture. Service and loop take turns; while one works, the
other sleeps. A loop, in batches of AT_ONCE pictures as a worker's on a CPU, is timed before and after the service.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection

from benchmarks import subject
from benchmarks.clients import Body, generate, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.stack import WAIT_S, Stack, cpu_s, stack
from benchmarks.subject import AT_ONCE
from benchmarks.timing import Deadline, figure, paired, seconds
from service.settings import Settings
from shared.diffusion.denoise import Stepper, sample
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


def beside(loop: Callable[[], float], serve: Callable[[], float]) -> tuple[float, float]:
    """Return the service's pictures/s, and the loop's, which is measured before and after it."""
    before = loop()
    return serve(), (before + loop()) / 2


def measure(quick: bool) -> Data:
    requests, larger, rounds, singles = (16, 8, 1, 3) if quick else (96, CLIENTS, 5, 15)
    count = AT_ONCE if quick else 4 * AT_ONCE
    ours, in_steps, distilled, settings = subject.promoted(), subject.in_steps(), subject.distilled(), Settings()
    stepper = ours.stepper()
    loop = bare(stepper, ours.options, count)
    loop_in_steps = bare(in_steps.stepper(), in_steps.options, count)
    one_step_loop = bare(distilled.stepper(), distilled.options, 3 * count)
    hot = subject.multi_hot(subject.label_lists(1), ours.vocabulary)
    with stack(LABELGRID_LOADED_MODELS="3") as running:
        say("  the service is up")
        for model in None, subject.IN_STEPS, subject.DISTILLED:
            saturate(running.port, AT_ONCE, model=model)  # warm
        for warm in loop, loop_in_steps, one_step_loop:
            warm()
        steps = partial(saturate, running.port, requests, model=subject.IN_STEPS)
        one_step = partial(saturate, running.port, larger, size=SEVERAL, model=subject.DISTILLED)
        served, several, alone, spent, loop_ms = [], [], [], [], []
        in_steps_rates, one_step_rates = [], []
        for _ in Deadline(ROUNDS_S).rounds(rounds):
            begun, before = cpu_s(os.getpid()), loop()
            loop_ms.append((cpu_s(os.getpid()) - begun) / count * 1000)
            rate, by_process = cpu_ms(running, requests)
            served.append(rate)
            spent.append(by_process)
            several.append(saturate(running.port, larger, size=SEVERAL))
            alone.append((before + loop()) / 2)
            in_steps_rates.append(beside(loop_in_steps, steps))
            one_step_rates.append(beside(one_step_loop, one_step))
        say(f"  {requests} requests of {CLIENTS} clients against the bare loop, {len(served)} rounds: done")
        end_to_end, one = [], []
        with contextlib.closing(HTTPConnection("127.0.0.1", running.port)) as client:
            for number_ in range(singles + 1):
                body = {"labels": subject.label_lists(1), "seed": number_}
                end_to_end.append(seconds(lambda body=body: post(client, body)))
                one.append(seconds(lambda: sample(stepper, hot, ours.options, [1])))
    end_to_end, one = end_to_end[1:], one[1:]
    steps_served, steps_alone = zip(*in_steps_rates, strict=True)
    one_step_served, one_step_alone = zip(*one_step_rates, strict=True)
    return {
        "figures": {
            "service.saturation_fraction": paired(served, alone),
            "service.saturation_fraction_several": paired(several, alone),
            "service.steps_fraction": paired(steps_served, steps_alone),
            "service.one_step_fraction": paired(one_step_served, one_step_alone),
            "service.pictures_per_s": figure(served),
            "service.cpu_ms_beside_loop": figure(
                sum(one.values()) - ms for one, ms in zip(spent, loop_ms, strict=True)
            ),
            "service.api_cpu_ms_per_request": figure(one["API"] for one in spent),
            "service.single_overhead_ms": figure((a - b) * 1000 for a, b in zip(end_to_end, one, strict=True)),
            "service.single_ratio": paired(end_to_end, one),
        },
        "several_pictures_per_s": figure(several),
        "steps_pictures_per_s": figure(steps_served),
        "steps_bare_pictures_per_s": figure(steps_alone),
        "one_step_pictures_per_s": figure(one_step_served),
        "one_step_bare_pictures_per_s": figure(one_step_alone),
        "bare_pictures_per_s": figure(alone),
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
    table = Table(["measurement", "service", "bare loop", "ratio"])
    ratio = figures["service.single_ratio"]
    for name, rates, alone, requests in (
        ("saturation_fraction", figures["service.pictures_per_s"], "bare", "1 picture per request"),
        ("saturation_fraction_several", data["several_pictures_per_s"], "bare", f"{SEVERAL} pictures per request"),
        ("steps_fraction", data["steps_pictures_per_s"], "steps_bare", f"1 picture per request, `{subject.IN_STEPS}`"),
        (
            "one_step_fraction",
            data["one_step_pictures_per_s"],
            "one_step_bare",
            f"{SEVERAL} pictures per request, `{subject.DISTILLED}`",
        ),
    ):
        table.add(
            f"pictures/s, {CLIENTS} clients, batches of {data['batch']}, {requests}",
            number(rates["median"]),
            number(data[f"{alone}_pictures_per_s"]["median"]),
            f"{figures[f'service.{name}']['median']:.3f}",
        )
    table.add(
        "one picture on an idle service, ms",
        number(data["single_ms"]["median"]),
        number(data["single_loop_ms"]["median"]),
        f"{ratio['median']:.3f}",
    )
    overhead = figures["service.single_overhead_ms"]["median"]
    allowed = data["goal_ms"]["median"]
    return [
        "The service answers over HTTP with verdicts, PNGs and grids; the bare loop only samples. "
        f"{figures['service.pictures_per_s']['n']} rounds of {data['requests']} requests, {data['singles']} single "
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
