"""Start-up time and memory: `python -m benchmarks.sections.startup`.

Times `python -m service` until its first answered request, in turns with a program that only samples a picture; a
worker's start and the API's import; measures the memory of API and worker.
"""

import contextlib
import os
import subprocess
import sys
import time
from http.client import HTTPConnection

import psutil

from benchmarks.document import Piece, number
from benchmarks.results import ROOT, STORAGE, Data, main, say
from benchmarks.sections.servers import ask
from benchmarks.stack import got, memory_mib, stack
from benchmarks.timing import figure, paired
from faults.harness import start, until
from service.local.demo import free_port
from service.local.redis_server import stop

IMPORT = "import time; s = time.perf_counter(); import service.api.app; print(time.perf_counter() - s)"
# What no server with these networks can beat: an interpreter that does nothing but sample the first picture.
BOUND = """
import sys
from pathlib import Path

import torch

from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.registry import resolve

storage = Path(sys.argv[1])
evaluator = load_evaluator(resolve(storage, None, "evaluator"))
denoiser = load_denoiser(resolve(storage, None, "denoiser"))
labels = torch.tensor(denoiser.vocabulary.multi_hot(["red cube"]))[None]
sample(denoiser.stepper(), labels, denoiser.options, [1])
print("sampled", flush=True)
sys.stdin.read()
"""


def first_picture() -> dict[str, float]:
    """Return the seconds from starting `python -m service` until it is ready, and until it answered one request.

    It runs a Redis server of its own.
    """
    port, start_at = free_port(), time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if not key.endswith("REDIS_URL")}
    process = start(["service", "--port", str(port), "--storage", str(STORAGE)], environment)
    try:
        until(lambda: got(port, "/readyz"), "the service")
        ready_s = time.perf_counter() - start_at
        with contextlib.closing(HTTPConnection("127.0.0.1", port)) as client:
            ask(client, {"labels": [["red cube"]], "seed": 1})
        first_s = time.perf_counter() - start_at
        parts = sum(child.memory_info().rss for child in psutil.Process(process.pid).children(recursive=True)) / 2**20
    finally:
        stop(process)
    return {"ready_s": ready_s, "first_picture_s": first_s, "memory_mib": parts}


def bound_seconds() -> float:
    """Return the seconds from starting an interpreter until it has sampled one picture by itself."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", BOUND, str(STORAGE)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - begun
        process.communicate()
    if process.returncode != 0 or line != "sampled\n":
        raise RuntimeError("the program that only samples a picture has failed")
    return taken


def import_seconds() -> float:
    """Return how long a fresh interpreter takes to import the API."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    return float(done.stdout)


def parts() -> dict[str, float]:
    """Return a worker's start-up time, and the memory of API and worker after one picture."""
    with stack(workers=0) as running:
        begun = time.perf_counter()
        running.start_workers(1)
        worker_s = time.perf_counter() - begun
        with running.client() as client:
            client.post("/generate", json={"labels": [["red cube"]]}).raise_for_status()
        assert running.api is not None
        return {
            "worker_s": worker_s,
            "api_mib": memory_mib(running.api),
            "worker_mib": memory_mib(running.workers[0]),
            "api_has_torch": float(_maps(running.api.pid, "libtorch")),
        }


def _maps(pid: int, library: str) -> bool:
    """Whether a process has loaded a shared library."""
    return any(library in entry.path for entry in psutil.Process(pid).memory_maps())


def measure(quick: bool) -> Data:
    rounds = 1 if quick else 3
    whole, bounds = list[dict[str, float]](), list[float]()
    for _ in range(rounds):  # in turns, so that a slow minute slows both
        whole.append(first_picture())
        bounds.append(bound_seconds())
    say("  python -m service answered its first request")
    apart = [parts() for _ in range(1 if quick else 2)]
    imports = [import_seconds() for _ in range(rounds)]
    return {
        "figures": {
            "startup.first_picture_s": figure(one["first_picture_s"] for one in whole),
            "startup.bound_s": figure(bounds),
            "startup.first_picture_vs_bound": paired([one["first_picture_s"] for one in whole], bounds),
            "startup.ready_s": figure(one["ready_s"] for one in whole),
            "startup.worker_s": figure(one["worker_s"] for one in apart),
            "startup.api_import_s": figure(imports),
            "startup.api_memory_mib": figure(one["api_mib"] for one in apart),
            "startup.worker_memory_mib": figure(one["worker_mib"] for one in apart),
        },
        "api_has_torch": any(one["api_has_torch"] for one in apart),
    }


def report(data: Data) -> list[Piece]:
    def of(key: str) -> str:
        return number(data["figures"][f"startup.{key}"]["median"])

    loaded = "has loaded torch, which it must not" if data["api_has_torch"] else "does not load torch"
    return [
        f"`python -m service` has its first picture after {of('first_picture_s')} s, {of('first_picture_vs_bound')} "
        f"times as long as a bare interpreter that loads the checkpoints and samples one ({of('bound_s')} s). A worker "
        f"alone is ready after {of('worker_s')} s. The API {loaded}; importing it takes {of('api_import_s')} s. After "
        f"one picture the API takes {of('api_memory_mib')} MiB of memory, a worker {of('worker_memory_mib')}.",
    ]


if __name__ == "__main__":
    main("startup", __doc__, measure)
