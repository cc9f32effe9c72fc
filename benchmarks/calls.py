"""Times network calls of the code on PYTHONPATH: `python -P benchmarks/calls.py STORAGE`. `sections/before.py` runs it.

Reads lines of two numbers, network rows and calls, and answers each with the mean seconds of a call. Its first line
says what it measures. Imports nothing of this package, since an older commit's code may be on PYTHONPATH.
"""

import json
import sys
import threading
import time
from pathlib import Path

import shared
from shared.diffusion.denoise import Row, Stepper
from shared.diffusion.model import load_denoiser
from shared.options import SamplingOptions
from shared.registry import resolve

# without guidance a picture has one network row; DDIM adds no noise
OPTIONS = SamplingOptions(sampler="ddim", steps=1000, guidance=1.0)


def call_s(stepper: Stepper, rows: list[Row], calls: int) -> float:
    """Return the mean seconds of a step of these rows, after one that wakes the threads and loads what it needs."""
    for row in rows:
        row.step = 0
    stepper.step(rows)
    for thread in threading.enumerate():
        if thread.name == "openvino":  # shared.openvino.LOADER
            thread.join()
    begun = time.perf_counter()
    for _ in range(calls):
        stepper.step(rows)
    return (time.perf_counter() - begun) / calls


def main(storage: Path) -> None:
    denoiser = load_denoiser(resolve(storage, None, "denoiser"))
    stepper = denoiser.stepper()
    labels = [0.0] * len(denoiser.vocabulary)
    rows = [stepper.new_row(labels, OPTIONS, seed=0)]
    call_s(stepper, rows, 1)
    library = "OpenVINO" if "openvino" in sys.modules else "torch"
    about = {"code": str(Path(shared.__file__).parents[1]), "library": library, "digest": denoiser.info.digest}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        count, calls = map(int, line.split())
        rows += [stepper.new_row(labels, OPTIONS, seed) for seed in range(len(rows), count)]
        print(call_s(stepper, rows[:count], calls), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
