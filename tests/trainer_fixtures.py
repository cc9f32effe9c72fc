"""A tiny synthetic data set folder and a tiny training configuration."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from iclevr.labels import ICLEVR
from trainer.config import TrainConfig

NETWORK = {
    "channels": [8, 16],
    "encoder_blocks": [1, 1],
    "decoder_blocks": [1, 1],
    "attention": [False, True],
    "head_channels": 8,
    "embedding": 16,
}
TINY = TrainConfig(network=NETWORK, image_size=16, batch=8, warmup_steps=2, log_snr_mean=0.0, layout_steps=2)


def write_objects_file(folder: Path, names: Sequence[str]) -> None:
    (folder / "objects.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))


def write_data_folder(
    folder: Path, pictures: int = 24, width: int = 16, height: int = 12, *, noise: bool = False
) -> Path:  # fmt: skip
    """Write `pictures` flat-coloured pictures; the label decides the colour. Or write pictures of noise."""
    (folder / "iclevr").mkdir(parents=True)
    train, rng = {}, np.random.default_rng(0)
    for i in range(pictures):
        label = i % len(ICLEVR)
        color = np.array([40 + 8 * label, 220 - 8 * label, 60 + 100 * (label % 2)], np.uint8)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8) if noise else np.tile(color, (height, width, 1))
        name = f"CLEVR_train_{i:06d}_0.png"
        Image.fromarray(pixels).save(folder / "iclevr" / name)
        train[name] = [ICLEVR.names[label]]
    write_objects_file(folder, ICLEVR.names)
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
    return folder
