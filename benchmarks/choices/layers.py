"""The cost of alternative layers: `python -m benchmarks.choices.layers` prints their pictures/s.

The variants take turns over several rounds, so that a slow minute slows all of them, and the median ratio to the
shipped network is printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from shared.device import autocast_dtype, pick_device
from shared.diffusion import unet
from shared.diffusion.unet import NetworkConfig, UNet

BATCH, ROUNDS = 32, 3


class GroupNorm(nn.GroupNorm):
    """Replaces ChannelNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__(8, channels)


class FusedAttention(unet.Attention):
    """Attention with the fused kernel instead of two products and a softmax."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


VARIANTS: dict[str, dict[str, Any]] = {
    "shipped: 64, 160, 256 channels on 2x2 blocks": {},
    "group norm instead of layer norm over channels": {"ChannelNorm": GroupNorm},
    "fused attention kernel": {"Attention": FusedAttention},
    "attention at 16x16 as well": {"attention": (False, True, True)},
    "one block at 32x32 on the way up": {"decoder_blocks": (1, 2, 2)},
    "two blocks at 32x32 on the way down": {"encoder_blocks": (2, 2, 2)},
    "192 channels at 16x16": {"channels": (64, 192, 256)},
    "4x4 blocks, 192 and 256 channels": {
        "block": 4,
        "channels": (192, 256),
        "encoder_blocks": (2, 2),
        "decoder_blocks": (2, 2),
        "attention": (False, True),
    },
    "float32": {"dtype": None},
}


def build(changes: dict[str, Any], device: torch.device) -> tuple[UNet, torch.dtype | None]:
    changes = dict(changes)
    dtype = changes.pop("dtype", autocast_dtype(device))
    patched = {name: changes.pop(name) for name in ("ChannelNorm", "Attention") if name in changes}
    kept = {name: getattr(unet, name) for name in patched}
    for name, layer in patched.items():
        setattr(unet, name, layer)
    network = UNet(NetworkConfig(num_labels=24, **changes)).to(device, memory_format=torch.channels_last)
    for name, layer in kept.items():
        setattr(unet, name, layer)
    return network, dtype


def timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    device = pick_device()
    x = torch.randn(BATCH, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    t = torch.randint(0, 1000, (BATCH,), device=device)
    labels, keep = (
        (torch.rand(BATCH, 24, device=device) < 0.1).float(),
        torch.ones(BATCH, dtype=torch.bool, device=device),
    )
    networks = {name: build(changes, device) for name, changes in VARIANTS.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"train": [], "sample": []} for name in networks}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, (network, dtype) in networks.items():

            def forward(network: UNet = network, dtype: torch.dtype | None = dtype) -> Tensor:
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    out: Tensor = network(x, t, labels, keep)
                return out

            def train(network: UNet = network, forward: Callable[[], Tensor] = forward) -> None:
                forward().float().square().mean().backward()
                network.zero_grad()

            times[name]["train"].append(timed(train, device))
            with torch.inference_mode():
                times[name]["sample"].append(timed(forward, device))
    table = Table(
        "variant", "parameters", "training/s", "ratio", "sampling/s", "ratio", title=f"{device}, batch {BATCH}"
    )
    first = next(iter(times.values()))
    for name, by_kind in times.items():
        row = [name, f"{sum(p.numel() for p in networks[name][0].parameters()) / 1e6:.1f} M"]
        for kind, seconds in by_kind.items():
            ratios = [a / b for a, b in zip(first[kind][1:], seconds[1:], strict=True)]
            row += [f"{BATCH / statistics.median(seconds[1:]):.0f}", f"{statistics.median(ratios):.2f}"]
        table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
