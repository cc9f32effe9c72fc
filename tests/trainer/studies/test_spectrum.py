"""The spectrum of generated pictures against a folder's."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.checkpoint import read_info
from shared.diffusion.model import load_denoiser
from shared.vocabulary import ICLEVR
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler
from tests.trainer.command_line import Command, refused
from tests.trainer_fixtures import write_data_folder
from trainer.data import load_dataset, to_float
from trainer.pictures import as_tensor, find_pictures
from trainer.stages.octaves import octave_power
from trainer.studies.spectrum import examine


def write_folder(folder: Path) -> Path:
    write_data_folder(folder, 5, 64, 48)
    rng = np.random.default_rng(0)
    for path in sorted((folder / "iclevr").iterdir()):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    return folder


def test_ratios_are_those_of_the_pictures_it_returns(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    publish_toy_upsampler(tmp_path, "large", publish_toy_denoiser(tmp_path, "toy", 0))
    denoiser = load_denoiser(tmp_path / "large.safetensors")
    pictures = find_pictures([folder], "32x24")
    options = denoiser.options.model_copy(update={"steps": 2})
    report, shown = examine(denoiser, load_dataset(folder, size=16), pictures, options, count=3, seed=1)
    assert (report.model, report.pictures, shown.shape) == ("large", 3, (6, 3, 24, 32))
    chosen = [as_tensor(pictures.read(i)) for i in (0, 2, 4)]
    assert all(np.array_equal(shown[2 * i + 1], to_float(one[None])[0]) for i, one in enumerate(chosen))
    ratio = octave_power(shown[::2]) / octave_power(shown[1::2])
    assert report.generated == pytest.approx(ratio.tolist())
    assert report.interpolated != report.generated != report.without_dots
    assert len(report.interpolated) == len(report.without_dots) == len(report.generated) == 3


def test_the_command_prints_a_row_for_each_octave(command: Command, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    base = publish_toy_denoiser(tmp_path, "toy", 0, positions=True)
    publish_toy_upsampler(tmp_path, "large", read_info(tmp_path / "toy.safetensors"))
    assert base.name == "toy"
    common = ["spectrum", folder, "--storage", tmp_path, "--model", "large"]
    out_file, grid = tmp_path / "out.json", tmp_path / "grid.png"
    code, out, err = command(*common, "--count", 2, "--json", out_file, "--grid", grid)
    assert code == 0, err
    assert all(period in out for period in ("below 4", "4 to 8", "8 to 16"))
    assert json.loads(out_file.read_text())["pictures"] == 2
    assert grid.exists()
    refused(command(*common, "--json", tmp_path / "out.txt"), "must end in .json")


@pytest.mark.parametrize("names", [ICLEVR.names[::-1], ICLEVR.names[:5]])
def test_a_folder_with_other_labels_is_refused(command: Command, tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / "objects.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    publish_toy_denoiser(tmp_path, "toy", 0)
    answer = command("spectrum", folder, "--storage", tmp_path, "--model", "toy", "--count", 2)
    refused(answer, "the denoiser and the folder must have one vocabulary")
