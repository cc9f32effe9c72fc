"""Trains the map of the objects alone: what it draws of each block is compared with the detail of the render.

A stage before `one_step.py`, with the same networks. There a step sees few pictures, since it draws whole squares. The
map draws each block by itself, so here a step sees single blocks of many pictures.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.diffusion.upsampler import Drawn, crop, without_margin
from shared.pictures import grid
from trainer.data import read_all, to_float
from trainer.objectives.adversary import detail_of
from trainer.objectives.one_step import DETAIL, OneStep, OneStepNetworks, places_of_objects
from trainer.objectives.upsampler import MEASURED, SHOWN
from trainer.runs import Run, log_samples

AROUND: Final = (0.15, 0.21)  # of the picture's width and height: how far a block is from its object at most


class ObjectMapAlone(OneStep):
    """The objective: draw the detail of `map_blocks` blocks of each picture, around its objects."""

    @property
    def edge(self) -> int:
        """Blocks beside which detail is the difference from fewer pixels."""
        return -(-(DETAIL // 2) // self.network.block)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Draw labels, rows and columns of blocks around objects (B, k, 2), and their detail (B, k, pixels)."""
        return self._blocks(self.trained[index], share, generator)

    def _blocks(self, chosen: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        labels, k, block = self.labels[chosen], self.config.map_blocks, self.network.block
        places = places_of_objects(labels, k, generator)
        at = places + (torch.rand(len(chosen), k, 2, generator=generator) * 2 - 1) * torch.tensor(AROUND)
        counts = torch.tensor([side // block for side in self.pictures.size])
        at = (at * counts).long().clamp(torch.tensor(self.edge), counts - 1 - self.edge)[share].flip(-1)  # row, column
        whole = read_all(self.pictures, chosen[share])
        around = crop(whole, (at - self.edge) * block, (1 + 2 * self.edge) * block)
        middle = slice(self.edge * block, (self.edge + 1) * block)
        detail = F.pixel_unshuffle(detail_of(to_float(around), DETAIL)[..., middle, middle], block)
        return [labels[share], at, detail.view(len(at), k, -1)]

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the mean error of the blocks' detail."""
        labels, at, detail = inputs
        drawn = cast(Drawn, network(labels, at[..., :1], at[..., 1:])).detail  # (B, pixels, k, 1)
        return (drawn[..., 0].transpose(1, 2) - detail).abs().mean()

    @torch.inference_mode()
    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        """Return the error of blocks of held-out renders, and write what is drawn of some, beside their detail."""
        chosen, upsampler = self.held_out[:MEASURED], cast(OneStepNetworks, network).drawing.upsampler
        device = next(network.parameters()).device
        inputs = [one.to(device) for one in self._blocks(chosen, slice(None), torch.Generator().manual_seed(0))]
        loss = float(self(network, *inputs))
        some = chosen[:SHOWN]
        drawn, share = (without_margin(one).cpu() for one in upsampler.draw(self.labels[some].to(device)))
        target = detail_of(to_float(read_all(self.pictures, some)), DETAIL)
        made = F.pixel_shuffle(drawn * share, self.network.block)
        log_samples(self.folder, grid(torch.stack([made, target], 1).flatten(0, 1), columns=2), run.step)
        return {"held_out_loss": loss}
