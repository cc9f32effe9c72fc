"""Presets of a training run, and changes to them."""

import pytest
import torch
from pydantic import ValidationError

from shared.diffusion.unet import NetworkConfig
from shared.options import MAX_SEED
from trainer.config import PRESETS, REPORT_EPOCHS, make_config
from trainer.runs import step_seed


def test_the_reports_hyperparameters() -> None:
    report = PRESETS["report"]
    assert (report.timesteps, report.schedule, report.prediction) == (1000, "sigmoid", "eps")
    assert (report.loss_weight, report.noise_levels, report.label_dropout) == ("none", "uniform", 0.1)
    assert report.label_dropout_by == "batch"
    assert (report.optimizer, report.lr, report.betas, report.weight_decay) == ("adamw", 3e-4, (0.9, 0.999), 0.01)
    assert (report.batch, report.warmup_steps, report.cooldown, report.clip_norm) == (48, 0, 0, None)
    assert (report.ema_decay, report.ema_start, report.publish) == (0.995, 2000, "short")
    assert (report.image_size, report.fit, report.network["block"], REPORT_EPOCHS) == (32, "pad", 1, 300)
    NetworkConfig(num_labels=24, image_size=32, **report.network)


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
