"""The spectrum of generated pictures against a folder's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler
from tests.trainer.command_line import Command, succeeded
from tests.trainer_fixtures import write_data_folder
from trainer.data import as_tensor, to_float
from trainer.data_folder import find_pictures
from trainer.octaves import octave_power


def test_ratios_are_those_of_the_pictures_it_shows(command: Command, tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "data", 5, 64, 48, noise=True)
    publish_toy_upsampler(Path("models"), "large", publish_toy_denoiser(Path("models"), "toy", 0))
    out = succeeded(command("evaluate", "large", "--only", "spectrum", "--data", folder, "--count", 3, "--out", "."))
    assert all(period in out for period in ("below 4", "4 to 8", "8 to 16"))
    found = json.loads(Path("spectrum.json").read_text())
    assert found["title"].startswith("power of 3 pictures of large")
    with Image.open("spectrum.png") as image:
        grid = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    shown = to_float(torch.stack([grid[:, y : y + 24, x : x + 32] for y in (2, 28, 54) for x in (2, 36)]))
    pictures = find_pictures([folder], "32x24")
    chosen = [as_tensor(pictures.read(i)) for i in (0, 2, 4)]
    assert all(torch.equal(shown[2 * i + 1], to_float(one[None])[0]) for i, one in enumerate(chosen))
    ratio = octave_power(shown[::2]) / octave_power(shown[1::2])
    figures = [list(row.values())[1:] for row in found["rows"]]
    assert [row[0] for row in figures] == pytest.approx(ratio.tolist(), rel=0.01)  # the shown are rounded to 8 bits
    assert [len(set(row)) for row in figures] == [3, 3, 3]
