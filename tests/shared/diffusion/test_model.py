"""Denoisers that cannot be loaded are refused by name and reason, as a worker expects it."""

from pathlib import Path

import pytest
import torch

from shared.checkpoint import CheckpointError, publish
from shared.diffusion.model import load_denoiser
from tests.toy_checkpoint import publish_toy_denoiser


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head.bias": torch.zeros(5)}, "RuntimeError: The size of tensor a"),
        ({"head.weight.up": torch.zeros(12, 2)}, "KeyError: 'head.weight.down'"),
        ({"head.weight.up": torch.zeros(12, 2), "head.weight.down": torch.zeros(3, 8)}, "RuntimeError: mat1 and mat2"),
        ({"head.weight": torch.zeros(12, 72), "tail.bias": torch.zeros(12)}, "it changes tail.bias, which its base"),
        ({"tail.up": torch.zeros(1), "tail.down": torch.zeros(1)}, "it changes tail, which its base does not have"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    changes: dict[str, torch.Tensor], reason: str, tmp_path: Path
) -> None:
    base = publish_toy_denoiser(tmp_path, "toy", 0)
    config = {**base.config, "base": {"name": base.name, "digest": base.digest}}
    path = publish(tmp_path, "fast", changes, kind="denoiser", vocabulary=base.vocabulary, config=config, training={})
    with pytest.raises(CheckpointError, match=rf"fast\.safetensors: configuration and weights do not fit: .*{reason}"):
        load_denoiser(path)
