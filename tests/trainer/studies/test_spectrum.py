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
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder, write_objects_file
from trainer.data import load_dataset, to_float
from trainer.full_size import as_tensor, find_pictures
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
    out = succeeded(command(*common, "--count", 2, "--json", out_file, "--grid", grid))
    assert all(period in out for period in ("below 4", "4 to 8", "8 to 16"))
    assert json.loads(out_file.read_text())["pictures"] == 2
    assert grid.exists()
    refused(command(*common, "--json", tmp_path / "out.txt"), "must end in .json")


def test_pictures_without_labels_are_left_out(command: Command, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    train = json.loads((folder / "train.json").read_text())
    publish_toy_denoiser(tmp_path, "toy", 0)
    at = ("spectrum", folder, "--storage", tmp_path, "--model", "toy", "--json", tmp_path / "a.json")
    (folder / "train.json").write_text(json.dumps({**train, next(iter(train)): []}))
    assert command(*at)[0] == 0
    assert json.loads((tmp_path / "a.json").read_text())["pictures"] == 4
    (folder / "train.json").write_text(json.dumps(dict.fromkeys(train, ())))
    refused(command(*at), "none of the pictures has labels")


def test_the_order_of_the_folders_labels_does_not_matter(command: Command, tmp_path: Path) -> None:
    folder, found = write_folder(tmp_path / "data"), []
    publish_toy_denoiser(tmp_path, "toy", 0, positions=True)
    for names in (ICLEVR.names, ICLEVR.names[::-1]):
        write_objects_file(folder, names)
        to = tmp_path / "a.json"
        succeeded(command("spectrum", folder, "--storage", tmp_path, "--model", "toy", "--count", 2, "--json", to))
        found.append(json.loads(to.read_text()))
    assert found[0] == found[1]
