"""What drawing until exact costs: `python -m benchmarks.sections.selected`.

Clients with one open request of one picture each send plain requests, and in turn as many of which every other one has
`until: exact`. Measured are the p95 of both kinds, and by the service's evaluator, which selects, exact match of the
first attempts and of the pictures that were kept, and the network rows of the other attempts.
"""

import json
import time
from collections import defaultdict
from http.client import HTTPConnection
from typing import Any

import numpy as np

from benchmarks import subject
from benchmarks.clients import Body, generate, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.stack import WAIT_S, stack
from benchmarks.timing import Deadline, figure, order, percentile, pooled_p95
from iclevr.labels import ICLEVR

OBJECTS = 3, 5, 8
ATTEMPTS = 8
CLIENTS = 8
ROUNDS_S = 400.0  # a slow machine takes fewer rounds
ALONE, BESIDE, SELECTED = "plain alone", "plain beside", "until exact"


def bodies(objects: int, count: int, turn: int, *, select: bool) -> list[dict[str, Any]]:
    """Draw requests of one picture each, every other one until it is exact if `select`."""
    dice = np.random.default_rng([objects, turn])
    until = {"until": "exact", "attempts": ATTEMPTS}
    return [
        {"labels": [[ICLEVR.names[k] for k in dice.permutation(len(ICLEVR))[:objects]]], "seed": i}
        | (until if select and i % 2 else {})
        for i in range(count)
    ]


class Seen:
    """What clients saw of pictures of so many objects: latencies by kind and round, and jobs that were selected."""

    def __init__(self) -> None:
        self.latencies: dict[str, list[list[float]]] = defaultdict(list)
        self.jobs: list[list[dict[str, Any]]] = []

    def load(self, port: int, asked: list[dict[str, Any]], plain: str) -> None:
        """Send requests and note their latencies, those of plain requests as of the kind `plain`."""
        taken, jobs = dict[str, list[float]](), list[dict[str, Any]]()

        def ask(connection: HTTPConnection, body: Body) -> None:
            begun = time.perf_counter()
            job = json.loads(generate(connection, body, {"Prefer": f"wait={WAIT_S}"}))
            if job["status"] != "finished":
                raise RuntimeError(f"POST /generate returned {job}")
            taken.setdefault(SELECTED if "until" in body else plain, []).append(time.perf_counter() - begun)
            if "until" in body:
                jobs.append(job)

        send_all(port, asked, CLIENTS, ask)
        for kind, found in taken.items():
            self.latencies[kind].append(found)
        if jobs:
            self.jobs.append(jobs)

    def exact(self, rows: int) -> tuple[Data, Data, Data]:
        """Return exact match of first attempts and of kept ones, and the network rows of attempts after the first.

        `rows`: of one attempt.
        """
        first, kept, extra = list[float](), list[float](), list[float]()
        for jobs in self.jobs:
            pictures = [job["result"]["pictures"][0] for job in jobs]
            first.append(sum(one["attempts"][0]["exact"] for one in pictures) / len(jobs))
            kept.append(sum(one["exact"] for one in pictures) / len(jobs))
            extra.append(sum(rows * (len(one["attempts"]) - 1) for one in pictures) / len(jobs))
        return figure(first), figure(kept), figure(extra)


def measure(quick: bool) -> Data:
    count, rounds = (8, 1) if quick else (64, 6)
    seen, ours = {objects: Seen() for objects in OBJECTS}, subject.promoted()
    rows_each = sum(subject.network_rows(ours.stepper(), ours.options))
    with stack() as running:
        Seen().load(running.port, bodies(OBJECTS[-1], CLIENTS, 0, select=True), ALONE)  # warm
        for turn in Deadline(ROUNDS_S).rounds(rounds):
            for objects, found in seen.items():
                for select in order(turn):
                    asked = bodies(objects, count, turn + 1, select=bool(select))
                    found.load(running.port, asked, BESIDE if select else ALONE)
            say(f"  round {turn + 1} of {rounds}: done")
    data: Data = {"figures": {}, "p95_s": {}, "pictures": {}, "requests": count}
    for objects, found in seen.items():
        first, kept, rows = found.exact(rows_each)
        latencies = found.latencies
        data["figures"] |= {
            f"selected.first_exact_{objects}": first,
            f"selected.exact_{objects}": kept,
            f"selected.extra_rows_{objects}": rows,
            f"selected.plain_p95_beside_{objects}": pooled_p95(latencies[BESIDE], latencies[ALONE]),
            f"selected.p95_{objects}": pooled_p95(latencies[SELECTED], latencies[BESIDE]),
        }
        data["pictures"][str(objects)] = sum(map(len, found.jobs))
        data["p95_s"][str(objects)] = {
            kind: percentile([one for each in times for one in each], 0.95) for kind, times in latencies.items()
        }
    return data


def report(data: Data) -> list[Piece]:
    table = Table(
        [
            "objects", "pictures", "exact, first attempt", "exact, selected", "extra network rows a picture",
            "p95 of plain ones, ms", "p95 of plain ones beside, ms", "p95 until exact, ms", "beside over alone",
        ]
    )  # fmt: skip
    for objects in OBJECTS:
        found = {what: data["figures"][f"selected.{what}_{objects}"]["median"] for what in ("first_exact", "exact")}
        rows = data["figures"][f"selected.extra_rows_{objects}"]["median"]
        ms = [number(1000 * data["p95_s"][str(objects)][kind]) for kind in (ALONE, BESIDE, SELECTED)]
        ratio = data["figures"][f"selected.plain_p95_beside_{objects}"]["median"]
        shares = (f"{found[what]:.3f}" for what in ("first_exact", "exact"))
        table.add(objects, data["pictures"][str(objects)], *shares, number(rows), *ms, number(ratio))
    return [
        f"{CLIENTS} clients, each with one open request of one picture, send {data['requests']} a round: all plain, "
        f"and in turn every other one with `until: exact` and {ATTEMPTS} attempts. The evaluator that selects also "
        "judges here; [another one](results.md#the-default-model) sees less of the gain.",
        table,
    ]


if __name__ == "__main__":
    main("selected", __doc__, measure)
