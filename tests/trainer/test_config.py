"""Presets of a training run, and changes to them."""

import pytest
import torch
from pydantic import ValidationError

from shared.options import MAX_SEED
from trainer.config import PRESETS, make_config
from trainer.runs import step_seed


def test_changes_to_a_preset() -> None:
    config = make_config("default", ["batch=8", "fit=pad", "clip_norm=null", "network.channels=[8,16,32]"])
    assert (config.batch, config.fit, config.clip_norm) == (8, "pad", None)
    assert config.network == {"channels": [8, 16, 32]}
    assert make_config("report", []) == PRESETS["report"]


def test_every_seed_that_is_taken_serves_torch() -> None:
    assert make_config("default", [f"seed={MAX_SEED}"]).seed == MAX_SEED
    assert step_seed(3, 5) == 3_000_014  # as ever, so that old runs resume
    assert step_seed(MAX_SEED, 1) != step_seed(MAX_SEED, 2)
    torch.Generator().manual_seed(step_seed(MAX_SEED, 10**9))
    with pytest.raises(ValidationError, match="seed"):
        make_config("default", [f"seed={MAX_SEED + 1}"])
