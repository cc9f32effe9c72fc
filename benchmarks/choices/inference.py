"""Attempts to make network calls faster on a CPU: `python -m benchmarks.choices.inference`.

Prints the speed of other ways to call the shipped network, relative to the way it is served; they take turns. Torch
compiles two of them for each batch size, which needs a C++ compiler and 15 s or more each.
"""

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import subject
from benchmarks.baselines.samplers import InDtype
from benchmarks.choices.layers import FusedAttention
from benchmarks.sections.roofline import call, inputs, variants
from benchmarks.timing import in_turn, ratios
from shared.device import autocast_dtype
from shared.diffusion.model import Denoiser
from shared.diffusion.unet import Attention

ROWS, ROUNDS = (1, 4, 16, 32), 9
SERVED = "as served"


def compiled(denoiser: Denoiser, rows: int) -> Callable[[], object]:
    """Return a call of the module, compiled by torch's inductor for `rows` rows with weights as constants."""
    from torch._inductor import config

    config.freezing = True
    torch._dynamo.reset()
    network, arguments = torch.compile(denoiser.network, dynamic=False), inputs(rows, denoiser)
    x = arguments[0].contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", autocast_dtype(torch.device("cpu"))):
            network(x, *arguments[1:])

    return run


def compiled_ahead(denoiser: Denoiser, rows: int) -> Callable[[], object]:
    """Return a call of the module in bf16, compiled by AOTInductor for `rows` rows: no Python between operations."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package, config

    x, *others = inputs(rows, denoiser)
    arguments = (x.contiguous(memory_format=torch.channels_last), *others)
    module = InDtype(deepcopy(denoiser.network), torch.bfloat16).eval()
    with torch.no_grad(), config.patch(freezing=True):
        package = aoti_compile_and_package(torch.export.export(module, arguments))
    loaded = aoti_load_package(package)

    def run() -> None:
        with torch.inference_mode():
            loaded(*arguments)

    return run


def on_one_thread(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        work()
        torch.set_num_threads(threads)

    return run


def with_fused_attention(denoiser: Denoiser) -> Denoiser:
    """Return the served network with torch's fused attention kernel."""
    stepper = denoiser.stepper()
    for module in stepper.network.modules():  # type: ignore[attr-defined]
        if isinstance(module, Attention):
            module.mix = FusedAttention.mix.__get__(module)  # type: ignore[method-assign]
    return denoiser


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    denoiser, fused = subject.denoiser(), with_fused_attention(subject.denoiser())
    steppers = variants(denoiser) | {"served, attention by the fused kernel": fused.stepper()}
    found: dict[str, list[str]] = {}
    for rows in ROWS:
        works = {name: call(stepper, inputs(rows, denoiser)) for name, stepper in steppers.items()}
        works["served, on one thread"] = on_one_thread(works[SERVED])
        works["the module, compiled by torch"] = compiled(denoiser, rows)
        works["the module, compiled ahead of time"] = compiled_ahead(denoiser, rows)
        times = in_turn(works, ROUNDS)
        for name, taken in times.items():
            found.setdefault(name, []).append(f"{statistics.median(ratios(times[SERVED], taken)):.2f}")
    table = Table("way to call the network", *(f"{rows} rows" for rows in ROWS))
    for name, cells in found.items():
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
