"""Compares the power spectrum of generated pictures with that of a folder's pictures of the same labels and places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.diffusion.denoise import finish
from shared.diffusion.model import Denoiser
from shared.options import SamplingOptions, picture_seed
from trainer.data import Dataset, check_labelled, in_vocabulary, to_float
from trainer.full_size import Pictures, as_tensor
from trainer.stages.octaves import octave_power, without_dots

BATCH, SHOWN = 32, 8


@dataclass(frozen=True)
class Spectrum:
    """Power in each octave relative to the folder's pictures, the finest octave first."""

    model: str
    pictures: int
    generated: list[float]
    without_dots: list[float]  # of generated pictures, both theirs and the folder's without single dots
    interpolated: list[float]  # of the sampled pictures, enlarged by bicubic interpolation


@torch.inference_mode()
def examine(
    denoiser: Denoiser, dataset: Dataset, pictures: Pictures, options: SamplingOptions, *,
    count: int, seed: int, advance: Callable[[int], None] = lambda _: None,
) -> tuple[Spectrum, Tensor]:  # fmt: skip
    """Generate `count` pictures, one for each of as many labelled pictures of the folder, spread evenly over it.

    `dataset` and `pictures` are of that folder, the latter at the size of the denoiser's finished pictures. Objects
    stand where the folder says; without its positions, or for a denoiser that takes none, where the denoiser puts them.
    Also returns the first SHOWN pictures, each before the folder's. Raises TrainerError as `in_vocabulary`.
    """
    dataset = in_vocabulary(dataset, denoiser.vocabulary, denoiser.info.name)
    check_labelled(dataset, "pictures")
    known = dataset.labels.any(1).nonzero()[:, 0]
    chosen = known[torch.linspace(0, len(known) - 1, min(count, len(known))).long()]
    stepper, made, plain = denoiser.stepper(), list[Tensor](), list[Tensor]()
    places = dataset.positions if denoiser.layouts is not None else None
    for part in torch.split(chosen, BATCH):
        rows = [
            stepper.new_row(dataset.labels[i], options, picture_seed(seed, i), None if places is None else places[i])
            for i in part.tolist()
        ]
        made.append(finish(stepper, rows))
        plain.append(F.interpolate(torch.stack([row.x for row in rows]).cpu(), made[0].shape[2:], mode="bicubic"))
        advance(len(part))
    originals = to_float(torch.stack([as_tensor(pictures.read(i)) for i in chosen.tolist()]))
    power = octave_power(originals)
    generated, interpolated = (torch.cat(parts).clamp(-1, 1) for parts in (made, plain))
    smooth = octave_power(without_dots(generated)) / octave_power(without_dots(originals))
    ratios = [one.tolist() for one in (octave_power(generated) / power, smooth, octave_power(interpolated) / power)]
    shown = torch.stack([generated[:SHOWN], originals[:SHOWN]], 1).flatten(0, 1)
    return Spectrum(denoiser.info.name, len(chosen), *ratios), shown


def rows_of(spectrum: Spectrum) -> list[Sequence[str]]:
    """Return the rows of a table: period in pixels, and the ratios."""
    periods = [f"{2 ** (k + 1)} to {2 ** (k + 2)}" if k else "below 4" for k in range(len(spectrum.generated))]
    return [
        [period, *(f"{ratio:.3f}" for ratio in ratios)]
        for period, *ratios in zip(
            periods, spectrum.generated, spectrum.without_dots, spectrum.interpolated, strict=True
        )
    ]
