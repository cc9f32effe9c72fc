"""The network compared with what the machine can do: `python -m benchmarks.sections.roofline`.

The limit is the fastest of several convolutions and matrix products in the served precision, measured in turn with the
network. A profile shows where the rest of the time goes.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import subject
from benchmarks.baselines.samplers import InDtype
from benchmarks.document import Piece, Plot, Table, number
from benchmarks.results import Data, main, say
from benchmarks.timing import figure, in_turn, paired
from shared.device import autocast_dtype
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import Denoiser

SHAPES = [
    ("conv", 64, 32),
    ("conv", 160, 16),
    ("conv", 256, 8),
    ("conv", 256, 32),
    ("product", 1024, 0),
    ("product", 2048, 0),
]
GROUPS = {  # group -> words in its operators' names; the first match counts
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "matmul", "addmm"),
    "norms": ("norm",),
    "softmax": ("softmax",),
    "activations and arithmetic": ("silu", "add", "mul", "sigmoid", "sub", "div", "exp"),
    "copies, casts, layout": (
        "copy",
        "cat",
        "to",
        "clone",
        "contiguous",
        "upsample",
        "pixel",
        "reorder",
        "fill",
        "empty",
    ),
}


def inputs(count: int, denoiser: Denoiser) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments of a network call of `count` rows. Every other row drops its labels."""
    generator = torch.Generator().manual_seed(0)
    device = next(denoiser.network.parameters()).device
    x = torch.randn(count, *denoiser.image_shape, generator=generator)
    t = torch.randint(0, len(denoiser.alpha_bar), (count,), generator=generator)
    labels = subject.network_labels(denoiser, subject.label_lists(count))
    keep = torch.arange(count) % 2 == 0
    return x.to(device), t.to(device), labels.to(device), keep.to(device)


def flops_per_row(denoiser: Denoiser) -> float:
    """Count the floating-point operations of one network row's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        denoiser.network(*inputs(1, denoiser))
    return float(counter.get_total_flops())


def kernel(
    kind: str, width: int, side: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], float]:
    """Return a matrix product, or a 3x3 convolution of 64 pictures, and its number of operations."""
    if kind == "product":
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b, 2.0 * width**3
    x = torch.randn(64, width, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(width, width, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, w, None, 1, 1), 2.0 * 9 * width**2 * side**2 * 64


def synchronised(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def plain_stepper(
    denoiser: Denoiser, network: torch.nn.Module | None = None, dtype: torch.dtype | None = None
) -> Stepper:
    """Return a stepper on the unpacked network, under autocast."""
    device = next(denoiser.network.parameters()).device
    return Stepper(network or denoiser.network, denoiser.alpha_bar, denoiser.prediction, device=device, dtype=dtype)


def variants(denoiser: Denoiser) -> dict[str, Stepper]:
    """Return the served network and other ways to call it."""
    device = next(denoiser.network.parameters()).device
    dtype = autocast_dtype(device)
    found = {
        "as served": denoiser.stepper(),
        "the module under autocast (before)": plain_stepper(denoiser, dtype=dtype),
        "float32": plain_stepper(denoiser),
    }
    if dtype is not None:
        found["the module in bf16"] = plain_stepper(denoiser, InDtype(deepcopy(denoiser.network), dtype))
    return found


def call(stepper: Stepper, arguments: tuple[Tensor, Tensor, Tensor, Tensor]) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.inference_mode():
            return stepper._call_network(*arguments)

    return synchronised(run, stepper.device)


def group_of(operator: str) -> str:
    name = operator.removeprefix("aten::").removeprefix("mkldnn::")
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), "other")


def where_time_goes(work: Callable[[], object]) -> dict[str, float]:
    """Return each operator group's share of the time of one call."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    spent: dict[str, float] = {}
    for event in profiled.key_averages():
        spent[group_of(event.key)] = spent.get(group_of(event.key), 0.0) + event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    return {group: value / total for group, value in sorted(spent.items(), key=lambda item: -item[1])}


def measure(quick: bool) -> Data:
    batches, rounds = ([2, 32], 2) if quick else ([1, 2, 4, 8, 16, 32, 64], 5)
    denoiser = subject.denoiser()
    device = next(denoiser.network.parameters()).device
    dtype = autocast_dtype(device) or torch.float32
    flops = flops_per_row(denoiser)
    kernels = {
        f"{kind} {w}" + (f" at {s}x{s}" if s else ""): kernel(kind, w, s, dtype, device) for kind, w, s in SHAPES
    }
    works = {name: synchronised(work, device) for name, (work, _) in kernels.items()}
    steppers = variants(denoiser)
    for count in batches:
        arguments = inputs(count, denoiser)
        works |= {f"{name} | {count}": call(stepper, arguments) for name, stepper in steppers.items()}
    say(f"  {len(works)} kernels and network calls take turns, {rounds} rounds")
    with torch.inference_mode():
        times = in_turn(works, rounds)
    gflops = {name: figure(kernels[name][1] / s / 1e9 for s in times[name]) for name in kernels}
    best = max(gflops, key=lambda name: gflops[name]["median"])
    limit = [kernels[best][1] / s / flops for s in times[best]]  # rows/s
    rows = {
        name: {count: figure(count / s for s in times[f"{name} | {count}"]) for count in batches} for name in steppers
    }
    fractions = {count: paired([count / s for s in times[f"as served | {count}"]], limit) for count in batches}
    return {
        "figures": {
            "limit.fraction": fractions[32],
            "limit.rows_per_s": rows["as served"][32],
            "limit.speedup_vs_before": paired(
                times["the module under autocast (before) | 32"], times["as served | 32"]
            ),
        },
        "flops_per_row": flops,
        "precision": str(dtype).removeprefix("torch."),
        "gflops": gflops,
        "best": best,
        "rows": rows,
        "fractions": fractions,
        "profile": {
            name: where_time_goes(works[f"{name} | 32"]) for name in ("as served", "the module under autocast (before)")
        },
        "threads": torch.get_num_threads(),
    }


def report(data: Data) -> list[Piece]:
    best = data["gflops"][data["best"]]
    kernels = Table(["kernel", "GFLOP/s", "spread"])
    for name, rate in sorted(data["gflops"].items(), key=lambda item: -item[1]["median"]):
        kernels.add(name, number(rate["median"]), number(rate["spread"]))
    batches = list(data["fractions"])
    rows = Table(["rows per call", *batches])
    for name, rates in data["rows"].items():
        rows.add(f"{name}, rows/s", *(number(rates[count]["median"]) for count in batches))
    rows.add("as served, fraction of the limit", *(f"{data['fractions'][count]['median']:.2f}" for count in batches))
    names = list(data["profile"])
    profiled = Table(["share of the time at 32 rows", *names])
    for group in sorted(set().union(*data["profile"].values()), key=lambda g: -data["profile"][names[0]].get(g, 0)):
        profiled.add(group, *(f"{data['profile'][name].get(group, 0):.0%}" for name in names))

    def draw(axes: Sequence[Any]) -> None:
        (ax,) = axes
        for name, rates in data["rows"].items():
            ax.plot([int(count) for count in batches], [rates[count]["median"] for count in batches], "o-", label=name)
        ax.axhline(best["median"] * 1e9 / data["flops_per_row"], color="gray", linestyle="--", label="limit")
        ax.set(xlabel="rows per call", ylabel="rows/s", xscale="log")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=7)

    return [
        f"One network row takes {data['flops_per_row'] / 1e9:.2f} GFLOP of convolutions and matrix products (counted). "
        f"The limit is the fastest kernel below, {data['best']}: {number(best['median'])} GFLOP/s in "
        f"{data['precision']} on {data['threads']} threads. The network cannot reach it: norms, activations, skip "
        "connections and casts are not counted, and the narrow layers at 32x32 are slower than the best kernel.",
        kernels,
        rows,
        Plot("roofline", "rows per second by rows per call", draw),
        profiled,
    ]


if __name__ == "__main__":
    main("roofline", __doc__, measure)
