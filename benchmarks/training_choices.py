"""Is a training step faster compiled? `python -m benchmarks.training_choices`: the default recipe, on random pictures.

Prints the median seconds of a forward and backward pass, eager and compiled by torch, and how long compiling takes.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from shared.device import autocast_dtype, flush_denormals, kept_memory, pick_device
from shared.vocabulary import ICLEVR
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.objectives.denoiser import Denoising, make_network
from trainer.train import batch_indices


def step_seconds(objective: Denoising, network: nn.Module, config: TrainConfig, steps: int) -> list[float]:
    """Return the seconds of each step; the first includes what is done only once."""
    device, taken = pick_device(), []
    dtype, index = autocast_dtype(device), batch_indices(len(objective), config.batch, 0, 0)
    drawn = objective.draw(index, slice(0, config.batch), torch.Generator())
    inputs = [value.to(device) for value in drawn]
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = objective(network, *inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    flush_denormals()
    config, generator = TrainConfig(batch=given.batch), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (given.batch, 3, 64, 64), generator=generator).byte()
    labels = (torch.rand(given.batch, len(ICLEVR), generator=generator) < 0.1).float()
    positions = torch.rand(given.batch, len(ICLEVR), 2, generator=generator)
    objective = Denoising(Dataset(ICLEVR, images, labels, positions), config, pick_device())
    network = make_network(config, objective.dataset).to(pick_device())
    with kept_memory():
        eager = step_seconds(objective, network, config, given.steps)[1:]
        print(f"eager: {statistics.median(eager):.3f} s a step", flush=True)
        first, *compiled = step_seconds(objective, torch.compile(network), config, given.steps)  # type: ignore[arg-type]
        print(f"compiled: {statistics.median(compiled):.3f} s a step, {first:.0f} s for the first", flush=True)
        again = step_seconds(objective, network, config, given.steps)[1:]
        print(f"eager again: {statistics.median(again):.3f} s a step")


if __name__ == "__main__":
    main()
