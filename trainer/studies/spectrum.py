"""Compares the power spectrum of generated pictures with that of a folder's pictures of the same labels and places."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.diffusion.denoise import finish
from shared.options import picture_seed
from shared.pictures import grid, png_bytes
from trainer.data import as_tensor, to_float
from trainer.octaves import octave_power, without_dots
from trainer.studies.study import Report, Subject

BATCH, SHOWN = 32, 8


@torch.inference_mode()
def run(subject: Subject) -> Report:
    """Generate pictures, one for each of as many labelled pictures of the folder, spread evenly over it.

    Objects stand where the folder says; without its positions, or for a denoiser that takes none, where the denoiser
    puts them. Power is relative to that of the folder's pictures, the finest octave first: of the generated ones, of
    both without single dots, and of the sampled ones, enlarged by bicubic interpolation instead. The report shows the
    first SHOWN pictures, each before the folder's.
    """
    denoiser, dataset = subject.denoiser, subject.dataset
    known = dataset.labels.any(1).nonzero()[:, 0]
    chosen = known[torch.linspace(0, len(known) - 1, min(subject.count or 256, len(known))).long()]
    stepper, made, plain = denoiser.stepper(), list[Tensor](), list[Tensor]()
    places = dataset.positions if denoiser.layouts is not None else None
    advance = subject.advance("sampling", len(chosen))
    for part in torch.split(chosen, BATCH):
        rows = [
            stepper.new_row(
                dataset.labels[i], subject.options, picture_seed(subject.seed, i), None if places is None else places[i]
            )
            for i in part.tolist()
        ]
        made.append(finish(stepper, rows))
        plain.append(F.interpolate(torch.stack([row.x for row in rows]).cpu(), made[0].shape[2:], mode="bicubic"))
        advance(len(part))
    originals = to_float(torch.stack([as_tensor(subject.pictures.read(i)) for i in chosen.tolist()]))
    power = octave_power(originals)
    generated, interpolated = (torch.cat(parts).clamp(-1, 1) for parts in (made, plain))
    found = {
        "generated": octave_power(generated) / power,
        "both_without_single_dots": octave_power(without_dots(generated)) / octave_power(without_dots(originals)),
        "interpolated": octave_power(interpolated) / power,
    }
    octaves = []
    for k in range(len(power)):
        period = f"{2 ** (k + 1)} to {2 ** (k + 2)}" if k else "below 4"
        octaves.append({"period": period, **{name: float(ratios[k]) for name, ratios in found.items()}})
    shown = torch.stack([generated[:SHOWN], originals[:SHOWN]], 1).flatten(0, 1)
    title = f"power of {len(chosen)} pictures of {denoiser.info.name} over the folder's, by period in pixels"
    return Report(title, octaves, png=png_bytes(grid(shown, columns=2)))
