"""A worker that counts where its own thread's time goes: `python -m benchmarks.worker_profile`.

`sections/service.py` starts it. The worker serves the seconds of each part among its metrics, at
LABELGRID_METRICS_PORT, where `read` fetches them. A part that another part calls counts as its own time only.
"""

import functools
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from redis.client import Pipeline

from service.settings import Settings
from service.telemetry import logs
from service.telemetry.metrics import WORKER
from service.worker import completion, engine, runner
from service.worker import process as worker
from shared.diffusion.denoise import Stepper
from shared.evaluator import Evaluator

NAME = "benchmark_part_seconds"
SECONDS = Counter(NAME, "Of a part of the worker, by clock", ["part", "clock"], registry=None)
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
PARTS: list[tuple[str, Any, str]] = [
    ("network", Stepper, "step"),
    ("upsampler", Stepper, "pictures"),
    ("evaluator", Evaluator, "probabilities"),
    ("evaluator", Evaluator, "positions"),
    ("verdicts and recipes", engine.Engine, "_finish"),
    ("PNGs", engine, "png_bytes"),
    ("grids", completion, "compose_grid"),
    ("Redis", Redis, "execute_command"),
    ("Redis", Pipeline, "execute"),
    ("the runner", runner.Runner, "run"),
    ("the runner", runner.Runner, "run_once"),
    ("RQ", worker.PictureWorker, "execute_job"),
    ("RQ", worker.PictureWorker, "dequeue_job_and_maintain_ttl"),
]
_within = threading.local()


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its seconds counted: CPU time of its thread, and wall time."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        outer = getattr(_within, "seconds", None)  # seconds inside the parts that the enclosing part called
        _within.seconds = inner = dict.fromkeys(CLOCKS, 0.0)
        begun = {clock: now() for clock, now in CLOCKS.items()}
        try:
            return function(*arguments, **named)
        finally:
            for clock, now in CLOCKS.items():
                taken = now() - begun[clock]
                SECONDS.labels(part, clock).inc(max(0.0, taken - inner[clock]))
                if outer is not None:
                    outer[clock] += taken
            _within.seconds = outer

    return wrapper


def read(port: int) -> dict[str, dict[str, float]]:
    """Return the seconds so far, by part and clock, of the worker whose metrics are at `port`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found: dict[str, dict[str, float]] = {}
    for sample in next(family for family in families if family.name == NAME).samples:
        if sample.name == f"{NAME}_total":
            found.setdefault(sample.labels["part"], {})[sample.labels["clock"]] = sample.value
    return found


def main() -> None:
    WORKER.register(SECONDS)
    for part, owner, name in PARTS:
        setattr(owner, name, timed(part, getattr(owner, name)))
    settings = Settings()
    logs.configure(settings, "worker")
    worker.main(settings)


if __name__ == "__main__":
    main()
