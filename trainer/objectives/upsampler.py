"""The upsampler's objective (`stages/upsample.py`) as the loop takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.checkpoint import CheckpointInfo
from shared.diffusion.upsampler import UpsamplerConfig
from shared.storage import Location
from trainer.runs import Run
from trainer.stages.adversary import Adversaries
from trainer.stages.upsample import Upsampling, measure, publish_upsampler


@dataclass
class Upsampler:
    upsampling: Upsampling
    digest: str
    network: UpsamplerConfig
    base: CheckpointInfo
    folder: Path  # of the run
    device: torch.device
    kind: str = "upsampler"

    def __len__(self) -> int:
        return len(self.upsampling)

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        return self.upsampling.draw(index, share, generator)

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        return self.upsampling(network, *inputs)

    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        figures = measure(self.upsampling, self.folder, self.device, network, run)
        return {**figures, "held_out_loss": figures["l1"]}

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        assert isinstance(network, Adversaries)
        return publish_upsampler(self.network, network.upsampler.state_dict(), self.base, storage, name, training)
