"""What one network call a picture gains: `python -m benchmarks.sections.models`.

The default model, which draws a picture in one network call, and the model of several steps that draws the same
pictures, take turns on one service: pictures/s of 32 clients, each with one open request of one picture or eight, and
the latency of one picture on an idle service.
"""

import contextlib
from http.client import HTTPConnection

from benchmarks import subject
from benchmarks.document import Piece, Table, number
from benchmarks.results import STORAGE, Data, main, say
from benchmarks.sections.service import CLIENTS, SEVERAL, post, saturate
from benchmarks.stack import stack
from benchmarks.subject import AT_ONCE
from benchmarks.timing import Deadline, figure, order, paired, seconds
from shared.registry import promoted

ROUNDS_S = 150.0  # a slow machine takes fewer rounds


def measure(quick: bool) -> Data:
    requests, larger, rounds, singles = (16, 4, 1, 3) if quick else (96, CLIENTS, 4, 20)
    models = promoted(STORAGE), subject.IN_STEPS
    one_picture, several, alone = ([list[float](), list[float]()] for _ in range(3))
    with stack() as running:
        for model in models:
            saturate(running.port, AT_ONCE, model=model)  # warm
        for turn in Deadline(ROUNDS_S).rounds(rounds):
            for which in order(turn):
                one_picture[which].append(saturate(running.port, requests, model=models[which]))
                several[which].append(saturate(running.port, larger, size=SEVERAL, model=models[which]))
        say(f"  {requests} requests of {CLIENTS} clients, {len(several[0])} rounds of each model: done")
        with contextlib.closing(HTTPConnection("127.0.0.1", running.port)) as client:
            for turn in range(singles):
                body = {"labels": subject.label_lists(1), "seed": turn}
                for which in order(turn):
                    asked = {**body, "model": models[which]}
                    alone[which].append(seconds(lambda asked=asked: post(client, asked)))
    return {
        "figures": {
            "models.pictures_per_s": paired(*one_picture),
            "models.pictures_per_s_several": paired(*several),
            "models.single": paired(*alone),
        },
        "models": models,
        "pictures_per_s": [figure(found) for found in one_picture],
        "pictures_per_s_several": [figure(found) for found in several],
        "single_ms": [figure(1000 * s for s in found) for found in alone],
    }


def report(data: Data) -> list[Piece]:
    figures, (ours, steps) = data["figures"], data["models"]
    table = Table(["measurement", f"`{ours}`", f"`{steps}`", "ratio"])
    for what, key, ratio in (
        (f"pictures/s, {CLIENTS} clients, 1 picture per request", "pictures_per_s", "pictures_per_s"),
        (f"the same, {SEVERAL} pictures per request", "pictures_per_s_several", "pictures_per_s_several"),
        ("one picture on an idle service, ms", "single_ms", "single"),
    ):
        values = [number(one["median"]) for one in data[key]]
        table.add(what, *values, number(figures[f"models.{ratio}"]["median"]))
    return [
        f"`{steps}` draws the same pictures in six network rows and one of its upsampler. Both take turns on one "
        "service and in one worker.",
        table,
    ]


if __name__ == "__main__":
    main("models", __doc__, measure)
