"""Checkpoints in the real format that cost next to nothing: random weights, 16x16 pictures."""

from pathlib import Path

import torch
from torch import nn

from shared.checkpoint import promote, publish
from shared.evaluator import Evaluator
from shared.unet import NetworkConfig, UNet
from shared.vocabulary import ICLEVR

NETWORK = NetworkConfig(
    num_labels=len(ICLEVR),
    image_size=16,
    channels=(8, 16),
    encoder_blocks=(1, 1),
    decoder_blocks=(1, 1),
    attention=(False, True),
    head_channels=8,
    embedding=16,
)


def _randomize(module: nn.Module, seed: int) -> None:
    """Random weights everywhere: a fresh network has zeros where it begins as the identity, and ignores its labels."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3, generator=generator)


def publish_toys(storage: Path) -> None:
    """Denoisers `toy`, which is promoted, and `other`, and a promoted evaluator."""
    config = {"network": NETWORK.model_dump(mode="json"), "schedule": "cosine", "timesteps": 1000, "prediction": "v"}
    for seed, name in enumerate(("toy", "other")):
        network = UNet(NETWORK)
        _randomize(network, seed)
        state = network.state_dict()
        publish(storage, name, state, kind="denoiser", vocabulary=ICLEVR.names, config=config, training={})
    torch.manual_seed(0)  # ResNet's own initialization takes no generator
    judge = Evaluator(ICLEVR).resnet.state_dict()
    publish(storage, "toy-evaluator", judge, kind="evaluator", vocabulary=ICLEVR.names, config={}, training={})
    promote(storage, "toy")
    promote(storage, "toy-evaluator")
