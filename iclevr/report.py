"""The recipe of a student's report on i-CLEVR, our baseline: how it trained, and how it sampled."""

from typing import Final

from shared.options import SamplingOptions
from trainer.plugins import Preset

# 32x32 padded pictures, every pixel a position, sigmoid betas, unweighted noise prediction, timesteps drawn
# independently (Ho et al. 2020, algorithm 1), AdamW 3e-4, batch 48, labels dropped for a whole batch at a time. It
# samples ancestrally with sigma^2 = beta; its loop runs t = 999..1, 999 steps.
REPORT: Final = Preset(
    recipe={
        "network": {
            "block": 1,
            "channels": (64, 128, 256),
            "encoder_blocks": (1, 1, 1),
            "decoder_blocks": (1, 1, 1),
            "attention": (False, True, True),
        },
        "image_size": 32,
        "fit": "pad",
        "positions": False,
        "schedule": "sigmoid",
        "prediction": "eps",
        "loss_weight": "none",
        "noise_levels": "uniform",
        "stratified": False,
        "batch": 48,
        "label_dropout_by": "batch",
        "optimizer": "adamw",
        "lr": 3e-4,
        "betas": (0.9, 0.999),
        "warmup_steps": 0,
        "cooldown": 0.0,
        "clip_norm": None,
        "publish": "short",
    },
    sampling=SamplingOptions(sampler="ddpm", steps=999, spacing="uniform", guidance=3.0),
    epochs=300,
)
