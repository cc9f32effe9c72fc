"""The power in each octave of spatial frequency, and the spectrum of generated pictures against a folder's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler
from tests.trainer.command_line import Command, succeeded
from tests.trainer_fixtures import write_data_folder
from trainer.data import as_tensor, to_float
from trainer.data_folder import find_pictures
from trainer.studies.spectrum import octave_power, without_dots


def waves(period: float) -> Tensor:
    """Vertical stripes around a mean that does not count, (1, 3, 64, 96)."""
    x = torch.arange(96) * (2 * math.pi / period)
    return (0.5 + x.sin()).expand(1, 3, 64, 96)


@pytest.mark.parametrize(("period", "octave"), [(3.0, 0), (6.0, 1), (12.0, 2), (24.0, 3)])
def test_stripes_have_their_power_in_the_octave_of_their_period(period: float, octave: int) -> None:
    power = octave_power(waves(period))
    assert len(power) == 5
    assert float(power[octave] / power.sum()) > 0.98
    across = octave_power(waves(period).transpose(-1, -2))
    torch.testing.assert_close(across, power, rtol=1e-3, atol=1e-3 * float(power.sum()))


def test_power_is_that_of_the_pixels() -> None:
    """Parseval's theorem; only the periods longer than half of the shorter side are left out."""
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    window = torch.outer(torch.hann_window(32, periodic=False), torch.hann_window(32, periodic=False))
    pixels = ((x - x.mean((-2, -1), keepdim=True)) * window).square().mean((0, 1)).sum() * 32 * 32
    assert float(octave_power(x).sum() / pixels) == pytest.approx(1, abs=0.03)


def test_single_dots_are_removed_and_edges_stay() -> None:
    edge = torch.zeros(1, 1, 6, 6)
    edge[..., 3:] = 1
    assert torch.equal(without_dots(edge), edge)
    dotted = edge.clone()
    dotted[0, 0, 2, 1], dotted[0, 0, 4, 4] = 0.5, -0.2
    assert torch.equal(without_dots(dotted), edge)


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
    assert [len(set(row)) for row in figures] == [2, 2, 2]


def test_objects_stand_where_the_folder_says(command: Command, tmp_path: Path) -> None:
    names = list(json.loads((write_data_folder(tmp_path / "data", 4) / "train.json").read_text()))
    publish_toy_denoiser(Path("models"), "placing", 0, positions=True)
    found = []
    for place in ([0.2, 0.3], [0.8, 0.6], [0.2, 0.3]):
        (tmp_path / "data/positions.json").write_text(json.dumps({name: [place] for name in names}))
        succeeded(command("evaluate", "placing", "--only", "spectrum", "--data", "data", "--out", "."))
        found.append(json.loads(Path("spectrum.json").read_text()))
    assert found[0] == found[2] != found[1]
