"""Trains the windows of objects alone: what they draw is compared with the given pictures, but for their light.

A stage before `one_step.py`, with the same networks. There a step takes ten times as long, since all of them draw.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.diffusion.upsampler import Drawn, without_margin
from shared.pictures import grid
from trainer.data import read_all, to_float
from trainer.objectives.one_step import OneStep, OneStepNetworks, loss_of_drawn
from trainer.objectives.upsampler import MEASURED, SHOWN
from trainer.runs import Run, log_samples


class WindowsAlone(OneStep):
    """The objective: draw the objects of whole pictures."""

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw labels and the pictures of them."""
        return self.pairs(self.trained[index[share]])

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the mean error of all blocks."""
        labels, whole = inputs
        drawn = without_margin(cast(Drawn, network(labels)).pixels)
        real = F.pixel_unshuffle(to_float(whole), self.network.block)
        return loss_of_drawn(drawn, real, self.network.image_channels)

    @torch.inference_mode()
    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        """Return the error of held-out pictures, and write some beside what is drawn."""
        chosen, upsampler = self.held_out[:MEASURED], cast(OneStepNetworks, network).drawing.upsampler
        device = next(network.parameters()).device
        parts = [[one.to(device) for one in self.pairs(part)] for part in torch.split(chosen, self.config.batch)]
        loss = sum(float(self(network, *part)) * len(part[0]) for part in parts) / len(chosen)
        labels, whole = (one[:SHOWN] for one in parts[0])
        drawn = cast(Drawn, upsampler.draw(labels))
        made = F.pixel_shuffle(without_margin(drawn.pixels), self.network.block).cpu()
        log_samples(self.folder, grid(torch.stack([made, to_float(whole).cpu()], 1).flatten(0, 1), columns=2), run.step)
        return {"held_out_loss": loss}

    def pairs(self, chosen: Tensor) -> list[Tensor]:
        """Return labels and these pictures."""
        return [self.labels[chosen], read_all(self.pictures, chosen)]
