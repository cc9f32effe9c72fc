"""Two workers on a CPU, with half of its cores each, beside one that has all: `python -m benchmarks.sections.workers`.

Both services run all the time and take turns; the one whose turn it is not does nothing. Clients send one-picture
requests for a fixed time, on the quiet machine and beside a process that computes all the time.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks import subject
from benchmarks.busy import busy
from benchmarks.clients import Body, for_seconds, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.sections.servers import ask, shown
from benchmarks.stack import Stack, cpu_s, memory_mib, stack
from benchmarks.timing import order, paired, percentile, pooled_p95
from faults.harness import until
from service.local.supervisor import worker_environments

COUNTS = 1, 2  # workers
# clients, and processes that compute beside the service
CONDITIONS = {"crowd": (32, 0), "alone": (1, 0), "crowd_1_busy": (32, 1), "alone_1_busy": (1, 1)}
WARM_S = 8.0  # of requests before those that count: a worker compiles the sizes of its calls when they first come
SPAN_S, ROUNDS = 10.0, 5


@dataclass(frozen=True)
class Served:
    """What clients got while they sent requests for a while."""

    seconds: float  # until the last answer
    latencies: list[float]

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds


Both = tuple[list[Served], list[Served]]  # of one worker and of two, by round


def body(number_: int) -> Body:
    """Return a request of one picture."""
    return {"labels": subject.label_lists(1, seed=number_), "seed": number_}


def serve(port: int, span_s: float, clients: int) -> Served:
    """Let clients send requests for `span_s`, each the next one after its answer, and wait for all answers."""
    begun = time.perf_counter()
    latencies = send_all(port, for_seconds(span_s, body), clients, ask)
    return Served(time.perf_counter() - begun, latencies)


def is_idle(worker: int) -> bool:
    """Whether a process takes less than a tenth of a core for a second: a new worker may still compile."""
    before = cpu_s(worker)
    time.sleep(1.0)
    return cpu_s(worker) - before < 0.1


@contextmanager
def services(warm_s: float) -> Iterator[list[Stack]]:
    """Run a service with each number of workers, as `labelgrid serve --workers N` does, warm and idle."""
    with ExitStack() as running:
        found = [running.enter_context(stack(workers=0)) for _ in COUNTS]
        for one, count in zip(found, COUNTS, strict=True):
            one.start_workers(count, **worker_environments(count, "cpu")[0])
            serve(one.port, warm_s, 32)
            until(lambda worker=one.workers[0].pid: is_idle(worker), "a worker that does nothing")
        yield found


def measure(quick: bool) -> Data:
    seen: dict[str, Both] = {name: ([], []) for name in CONDITIONS}
    with services(2.0 if quick else WARM_S) as both:
        for turn in range(1 if quick else ROUNDS):
            for name, (clients, others) in CONDITIONS.items():
                with busy(others):
                    for place in order(turn):
                        seen[name][place].append(serve(both[place].port, 1.0 if quick else SPAN_S, clients))
            say(f"  one worker and two, round {turn + 1}")
        mib = [sum(map(memory_mib, running.workers)) for running in both]
    figures = dict[str, Data]()
    for name, (one, two) in seen.items():
        figures[f"workers.{name}"] = paired([served.rate for served in two], [served.rate for served in one])
        waits = [served.latencies for served in two], [served.latencies for served in one]
        figures[f"workers.{name}_p95"] = pooled_p95(*waits)
    return {
        "figures": figures,
        "mib": mib,
        "served": {name: [described(runs) for runs in both] for name, both in seen.items()},
    }


def described(runs: Sequence[Served]) -> Data:
    """Summarise what clients got, over all rounds."""
    latencies = [latency for one in runs for latency in one.latencies]
    rate = len(latencies) / sum(one.seconds for one in runs)
    return {"pictures_per_s": rate, "p95": percentile(latencies, 0.95)}


def report(data: Data) -> list[Piece]:
    table = Table(["clients", "busy processes", "pictures/s: one, two", "ratio", "p95, s: one, two", "ratio"])
    for name, both in data["served"].items():
        cells = list[str]()
        for key, figure_name in (("pictures_per_s", name), ("p95", f"{name}_p95")):
            cells += ", ".join(number(one[key]) for one in both), shown(data["figures"][f"workers.{figure_name}"])
        table.add(*CONDITIONS[name], *cells)
    one, two = data["mib"]
    return [
        "One worker with all cores, and two with half of them each (`labelgrid serve --workers 2`). Each client sends "
        "one picture's request after the other; busy processes only compute.",
        table,
        f"One worker takes {number(one)} MiB of memory, two take {number(two)}.",
    ]


if __name__ == "__main__":
    main("workers", __doc__, measure)
