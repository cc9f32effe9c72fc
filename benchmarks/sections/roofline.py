"""The network compared with what the machine can do: `python -m benchmarks.sections.roofline`.

The limit is the fastest of several convolutions and matrix products that the network's own library, OpenVINO or torch,
computes in the served precision, measured in turn with the network.
"""

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import subject
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.timing import Deadline, figure, in_turn, paired
from shared.device import autocast_dtype
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import Denoiser
from shared.options import SamplingOptions

AT = 16  # rows of the call that is compared with the limit
SHAPES = [
    ("conv", 64, 32),
    ("conv", 160, 16),
    ("conv", 256, 8),
    ("conv", 256, 32),
    ("product", 1024, 0),
    ("product", 2048, 0),
]
PICTURES = AT  # of a convolution; 64 do not fit into the caches and reach two thirds of the rate
LAYERS = 12  # of one kind in a row, so that casting input and output weighs little
LIMIT_S = 90.0

Work = Callable[[], object]


def flops_per_row(denoiser: Denoiser, stepper: Stepper) -> float:
    """Count the floating-point operations of one network row's matrix products and convolutions."""
    row = stepper.new_row([0.0] * stepper.network.num_labels, denoiser.options, seed=0)
    t, keep = torch.tensor([500], device=stepper.device), torch.tensor([True], device=stepper.device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        denoiser.network(row.x[None], t, row.labels[None], keep)
    return float(counter.get_total_flops())


def operations(kind: str, width: int, side: int) -> float:
    """Return the number of operations of LAYERS matrix products, or of as many 3x3 convolutions of PICTURES."""
    return LAYERS * (2.0 * width**3 if kind == "product" else 2.0 * 9 * width**2 * side**2 * PICTURES)


def torch_kernel(kind: str, width: int, side: int, dtype: torch.dtype, device: torch.device) -> Work:
    """Return LAYERS matrix products, or as many 3x3 convolutions, by torch."""
    if kind == "product":
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        works: list[Work] = [lambda: a @ b] * LAYERS
    else:
        x = torch.randn(PICTURES, width, side, side, device=device).to(dtype)
        w = torch.randn(width, width, 3, 3, device=device).to(dtype)
        x, w = (one.contiguous(memory_format=torch.channels_last) for one in (x, w))
        works = [lambda: F.conv2d(x, w, None, 1, 1)] * LAYERS

    def run() -> None:
        with torch.inference_mode():
            for work in works:
                work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def openvino_kernel(kind: str, width: int, side: int, dtype: torch.dtype) -> Work:
    """Return the same by OpenVINO, compiled for the shape: each layer takes the output of the one before."""
    import openvino
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    is_product = kind == "product"
    shape = [width, width] if is_product else [PICTURES, width, side, side]
    taps = width if is_product else 9 * width
    first = layer = ops.parameter(shape, np.float32)
    for _ in range(LAYERS):
        weights_shape = [width, width] if is_product else [width, width, 3, 3]
        # keeps the outputs' size near 1, far from denormals
        weights = ops.constant((rng.standard_normal(weights_shape) / math.sqrt(taps)).astype(np.float32))
        if is_product:
            layer = ops.matmul(layer, weights, False, False)
        else:
            layer = ops.convolution(layer, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(openvino.Model([layer], [first]), "CPU", hints)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(rng.standard_normal(shape).astype(np.float32)))
    return request.infer


def network_call(stepper: Stepper, count: int) -> Work:
    """Return a step of `count` pictures without guidance, each of which has one network row."""
    options = SamplingOptions(sampler="ddim", steps=1000, guidance=1.0)
    rows = [stepper.new_row([0.0] * stepper.network.num_labels, options, seed) for seed in range(count)]

    def run() -> None:
        for row in rows:
            row.step = 0
        stepper.step(rows)
        if stepper.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def library_of(stepper: Stepper) -> str:
    """Return the library in which a stepper's network runs: only one that uses OpenVINO imports it."""
    network_call(stepper, 1)()
    return "OpenVINO" if "openvino" in sys.modules else "torch"


def measure(quick: bool) -> Data:
    batches, rounds = ([2, AT], 2) if quick else ([1, 2, 4, 8, AT, 32], 7)
    denoiser = subject.in_steps()
    device = next(denoiser.network.parameters()).device
    dtype = autocast_dtype(device) or torch.float32
    stepper = denoiser.stepper()
    flops, library = flops_per_row(denoiser, stepper), library_of(stepper)
    works, done = dict[str, Work](), dict[str, float]()
    for kind, width, side in SHAPES:
        name = f"{kind} {width}" + (f" at {side}x{side}" if side else "")
        done[name] = operations(kind, width, side)
        works[name] = (
            openvino_kernel(kind, width, side, dtype)
            if library == "OpenVINO"
            else torch_kernel(kind, width, side, dtype, device)
        )
    works |= {f"{count} rows": network_call(stepper, count) for count in batches}
    say(f"  {len(done)} kernels of {library} and {len(batches)} network calls take turns, up to {rounds} rounds")
    times = in_turn(works, rounds, deadline=Deadline(LIMIT_S))
    gflops = {name: figure(done[name] / s / 1e9 for s in times[name]) for name in done}
    best = max(gflops, key=lambda name: gflops[name]["median"])
    limit = [done[best] / s / flops for s in times[best]]  # rows/s
    fractions = {count: paired([count / s for s in times[f"{count} rows"]], limit) for count in batches}
    rows = {count: figure(count / s for s in times[f"{count} rows"]) for count in batches}
    return {
        "figures": {"limit.fraction": fractions[AT], "limit.rows_per_s": rows[AT]},
        "library": library,
        "flops_per_row": flops,
        "precision": str(dtype).removeprefix("torch."),
        "gflops": gflops,
        "best": best,
        "rows": rows,
        "fractions": fractions,
    }


def report(data: Data) -> list[Piece]:
    best = data["gflops"][data["best"]]
    slowest = min(data["gflops"], key=lambda name: data["gflops"][name]["median"])
    batches = list(data["fractions"])
    rows = Table(["rows per call", *batches])
    rows.add("rows/s", *(number(data["rows"][count]["median"]) for count in batches))
    achieved = (data["rows"][count]["median"] * data["flops_per_row"] / 1e9 for count in batches)
    rows.add("GFLOP/s", *map(number, achieved))
    rows.add("fraction of the limit", *(f"{data['fractions'][count]['median']:.2f}" for count in batches))

    return [
        f"A network row takes {data['flops_per_row'] / 1e9:.2f} GFLOP of convolutions and matrix products; norms, "
        f"activations, skip connections and casts are not counted. The limit is the fastest kernel of "
        f"{data['library']}, {data['best']}: {number(best['median'])} GFLOP/s in {data['precision']}. The slowest, "
        f"{slowest}, has {number(data['gflops'][slowest]['median'])}.",
        rows,
    ]


if __name__ == "__main__":
    main("roofline", __doc__, measure)
