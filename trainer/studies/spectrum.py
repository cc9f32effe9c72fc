"""Compares the power spectrum of generated pictures with that of a folder's pictures of the same labels and places."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.options import picture_seed
from shared.pictures import grid, png_bytes
from trainer.data import read_all, to_float
from trainer.studies.study import Report, Subject

SHOWN = 8


def octave_power(pictures: Tensor) -> Tensor:
    """Return the mean power of pictures (N, C, H, W) in each octave, the finest first: (octaves,) float32.

    The first octave has periods of less than 4 pixels, the next 4 to 8, and so on, up to half of the shorter side. A
    Hann window keeps the step between opposite borders out of the fine octaves.
    """
    height, width = pictures.shape[-2:]
    x = pictures.float()
    x = x - x.mean((-2, -1), keepdim=True)
    window = torch.outer(*(torch.hann_window(side, periodic=False, device=x.device) for side in (height, width)))
    power = torch.fft.fft2(x * window).abs().square().mean((0, 1))  # (H, W)
    octave = _octave_of(height, width).to(x.device)
    count = int(math.log2(min(height, width))) - 1
    return torch.stack([power[octave == k].sum() for k in range(count)])


def without_dots(pictures: Tensor) -> Tensor:
    """Limit each value of (N, C, H, W) to the range of its eight neighbours' values: edges stay, single dots vanish.

    A network that is to reach a power may put dots along edges instead of sharpening them.
    """
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    around = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    return pictures.clamp(reduce(torch.minimum, around), reduce(torch.maximum, around))


def _octave_of(height: int, width: int) -> Tensor:
    """Return the octave of each coefficient of `fft2`: (H, W) int64, 0 the finest."""
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    period = (y.square() + x.square()).clamp(min=1e-12).rsqrt()
    octave: Tensor = period.log2().ceil().sub(2).clamp(min=0).long()
    return octave


@torch.inference_mode()
def run(subject: Subject) -> Report:
    """Generate pictures, one for each of as many labelled pictures of the folder, spread evenly over it.

    Objects stand where the folder says; without its positions, or for a denoiser that takes none, where the denoiser
    puts them. Power is relative to that of the folder's pictures, the finest octave first: as they are, and of both
    without single dots. The report shows the first SHOWN pictures, each before the folder's.
    """
    denoiser, dataset = subject.denoiser, subject.dataset
    known = dataset.labels.any(1).nonzero()[:, 0]
    chosen = known[torch.linspace(0, len(known) - 1, min(subject.count or 256, len(known))).long()]
    positions = None if denoiser.layouts is None or dataset.positions is None else dataset.positions[chosen]
    seeds = [picture_seed(subject.seed, i) for i in chosen.tolist()]
    generated = subject.sample(dataset.labels[chosen], seeds, positions).clamp(-1, 1)
    originals = to_float(read_all(subject.pictures, chosen))
    power = octave_power(originals)
    found = {
        "generated": octave_power(generated) / power,
        "both_without_single_dots": octave_power(without_dots(generated)) / octave_power(without_dots(originals)),
    }
    rows = []
    for k in range(len(power)):
        period = f"{2 ** (k + 1)} to {2 ** (k + 2)}" if k else "below 4"
        rows.append({"period": period, **{name: float(ratios[k]) for name, ratios in found.items()}})
    shown = torch.stack([generated[:SHOWN], originals[:SHOWN]], 1).flatten(0, 1)
    title = f"power of {len(chosen)} pictures of {denoiser.info.name} over the folder's, by period in pixels"
    return Report(title, rows, png=png_bytes(grid(shown, columns=2)))
