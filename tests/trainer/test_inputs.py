"""Picture-wide inputs: packed, read, merged, learnt, drawn with and without, by the plug-in of examples/."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.checkpoint import CheckpointError, read_info
from shared.diffusion import inputs
from shared.diffusion.inputs import INPUTS, LabelParts, PictureInput, register, split_labels, unknown, with_inputs
from shared.diffusion.layouts import with_positions
from shared.diffusion.model import load_denoiser
from shared.diffusion.unet import NetworkConfig
from shared.options import SamplingOptions
from tests.paths import ROOT
from tests.trainer.command_line import TINY
from tests.trainer_fixtures import write_data_folder
from trainer.data import labelled, load_dataset, merge
from trainer.errors import TrainerError


@pytest.fixture(autouse=True)
def _no_other_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "INPUTS", INPUTS)
    for name in list(INPUTS):
        monkeypatch.delitem(INPUTS, name)


def test_inputs_are_columns_that_are_alike_for_all_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INPUTS, "light", PictureInput())
    monkeypatch.setitem(INPUTS, "wind", PictureInput(numbers=2))
    values = {"light": torch.tensor([[0.5], [torch.nan]]), "wind": unknown(["wind"], 2)["wind"]}
    labels = torch.rand(2, 4)
    packed = with_inputs(labels, values, ("light", "wind"))
    assert packed.shape == (2, 4, 6)
    assert torch.equal(packed[..., 0], labels)
    assert packed[0, :, 1:].tolist() == [[0.5, 1, 0, 0, 0]] * 4
    assert packed[1, :, 1:].tolist() == [[0.0] * 5] * 4
    placed = with_positions(labels, torch.rand(2, 4, 2))
    assert torch.equal(with_inputs(placed, values, ("light", "wind"))[..., :3], placed)
    assert with_inputs(labels, {}, ()) is labels
    with pytest.raises(ValueError, match='there is another input "light"'):
        register("light", PictureInput(numbers=3))
    with pytest.raises(ValueError, match='the input "rain" is not registered'):
        inputs.width(["rain"])


@pytest.mark.parametrize("names", [(), ("light", "wind")])
@pytest.mark.parametrize("takes", [(), ("positions",), ("positions", "rotations")])
def test_what_was_joined_is_taken_apart(
    takes: tuple[str, ...], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INPUTS, "light", PictureInput())
    monkeypatch.setitem(INPUTS, "wind", PictureInput(numbers=2))
    labels, places, rotations = torch.rand(2, 4), torch.rand(2, 4, 2), torch.rand(2, 4, 2)
    joined = with_positions(labels, places, rotations if "rotations" in takes else None) if takes else labels
    values = {"light": torch.tensor([[0.5], [0.25]]), "wind": unknown(["wind"], 2)["wind"]}
    config = NetworkConfig(num_labels=4, inputs=names, **dict.fromkeys(takes, True))
    found = split_labels(with_inputs(joined, values, names), config)
    expected = LabelParts(
        labels, places if takes else None, rotations if "rotations" in takes else None,
        torch.tensor([[0.5, 1, 0, 0, 0], [0.25, 1, 0, 0, 0]]) if names else None,
    )  # fmt: skip
    assert [one if one is None else one.tolist() for one in found] == [
        one if one is None else one.tolist() for one in expected
    ]
    assert split_labels(labels, config) == LabelParts(labels)


def test_they_are_read_and_merged_and_faulty_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INPUTS, "light", PictureInput())
    folder = write_data_folder(tmp_path / "data", pictures=3)
    plain, names = load_dataset(folder, size=8), list(json.loads((folder / "train.json").read_text()))
    assert not plain.inputs
    (folder / "light.json").write_text(json.dumps({names[0]: 0.25, names[1]: None}))
    dataset = load_dataset(folder, size=8)
    assert dataset.digest != plain.digest
    wanted = torch.tensor([[0.25], [torch.nan], [torch.nan]])
    torch.testing.assert_close(labelled(dataset).inputs["light"], wanted, equal_nan=True)
    both = merge([plain, dataset]).inputs["light"]
    torch.testing.assert_close(both, torch.cat([torch.full((3, 1), torch.nan), wanted]), equal_nan=True)
    for content, message in (({names[0]: [1, 2]}, "has 2 numbers; light takes 1"), ({names[0]: "x"}, f"at {names[0]}")):
        (folder / "light.json").write_text(json.dumps(content))
        with pytest.raises(TrainerError, match=message):
            load_dataset(folder, size=8)


def test_the_plug_in_of_the_examples_is_all_that_an_input_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From measured pictures to drawn ones: brightness moves the picture, and the checkpoint needs the plug-in."""
    monkeypatch.chdir(tmp_path)
    write_data_folder(tmp_path / "data", pictures=8)

    def run(*arguments: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["brightness.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples/brightness.py"), run_name="__main__")
        assert ended.value.code == 0

    run("measure", "data")
    found = json.loads(Path("data/brightness.json").read_text())
    assert (len(found), len(set(found.values())) > 4, max(found.values()) < 1) == (8, True, True)
    sharp = ["--set", "lr=0.05", "--set", "warmup_steps=0", "--set", "publish=raw"]
    run("train", "denoiser", "--data", "data", "--name", "lit", "--steps", 12, *TINY, *sharp)
    run("draw", "lit", "picture.png", "red cube", "--brightness", 0.1, 0.9)
    assert Path("picture.png").stat().st_size > 0
    path = Path("models/lit.safetensors")
    assert read_info(path).config["network"]["inputs"] == ["brightness"]
    stepper, labels = load_denoiser(path).stepper(engine="torch"), [1.0] + [0.0] * 23
    options = SamplingOptions(steps=2)
    rows = [stepper.new_row(labels, options, 7, inputs=given) for given in ({}, {"brightness": [0.9]})]
    x, t, keep = rows[0].x[None], torch.tensor([500]), torch.tensor([True])
    outs = [stepper.network(x, t, row.labels[None], keep) for row in rows]
    assert float((outs[0] - outs[1]).detach().abs().max()) > 1e-4
    with pytest.raises(ValueError, match='the network takes no input "rain"'):
        stepper.new_row(labels, options, 7, inputs={"rain": [1.0]})
    monkeypatch.delitem(INPUTS, "brightness")
    with pytest.raises(CheckpointError, match='the input "brightness" is not registered; import the module'):
        load_denoiser(path)


def test_networks_without_inputs_are_described_as_before() -> None:
    assert "inputs" not in NetworkConfig(num_labels=2).model_dump(mode="json")
