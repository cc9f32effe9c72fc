"""The stage in which the painter learns alone: examples, what learns, and the command."""

from pathlib import Path

import numpy as np
import pytest
import torch

from iclevr.scenes import scene
from shared.diffusion.model import load_denoiser
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer.objectives.test_one_step import CHANGES, SET, publish_base, write_folder
from trainer.config import with_changes
from trainer.data import as_tensor, load_dataset
from trainer.data_folder import find_pictures
from trainer.errors import TrainerError
from trainer.objectives import camera
from trainer.objectives.one_step import SAMPLING, OneStepConfig, OneStepNetworks, make_networks
from trainer.objectives.painter import PaintingAlone

ALONE = "painter_alone=true"


@pytest.fixture
def stage(tmp_path: Path) -> tuple[PaintingAlone, OneStepNetworks]:
    publish_base(tmp_path)
    base, folder = load_denoiser(tmp_path / "step.safetensors"), write_folder(tmp_path / "data")
    pictures, config = find_pictures([folder], None), with_changes(OneStepConfig(), [*CHANGES, ALONE])
    networks = make_networks(base, base, pictures.size, config)
    upsampler = networks.drawing.upsampler.config
    return PaintingAlone(load_dataset(folder, size=16), pictures, base, upsampler, config, tmp_path / "run"), networks


def test_the_camera_is_the_renderers() -> None:
    np.testing.assert_allclose(camera.projection(), scene.projection(), rtol=1e-12)


def test_examples_are_labels_and_their_renders(stage: tuple[PaintingAlone, OneStepNetworks]) -> None:
    objective, _ = stage
    labels, whole = objective.draw(torch.tensor([0, 1, 2]), slice(1, 3), torch.Generator())
    assert torch.equal(labels, objective.labels[objective.trained[1:3]])
    assert torch.equal(whole[0], as_tensor(objective.pictures.read(int(objective.trained[1]))))


def test_the_painter_alone_learns(stage: tuple[PaintingAlone, OneStepNetworks]) -> None:
    objective, networks = stage
    inputs = objective.draw(torch.tensor([0, 1, 2]), slice(None), torch.Generator())
    learning = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, 1e-2)
    before = objective(networks, *inputs)
    for _ in range(30):
        optimizer.zero_grad()
        objective(networks, *inputs).backward()
        optimizer.step()
    assert objective(networks, *inputs) < 0.96 * before  # the renders are noise
    painter = networks.drawing.upsampler.painter
    assert painter is not None
    assert {id(one) for one in learning} == {id(one) for one in painter.parameters()}


def test_without_rotations_nothing_is_painted(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "step", 0, positions=True, sampling=SAMPLING.model_dump(mode="json"))
    base = load_denoiser(tmp_path / "step.safetensors")
    with pytest.raises(TrainerError, match="step paints no objects"):
        make_networks(base, base, (32, 24), with_changes(OneStepConfig(), [ALONE]))


def test_the_command_trains_the_painter_first(command: Command, tmp_path: Path) -> None:
    publish_base(tmp_path)
    folder = write_folder(tmp_path / "data")
    train = ["train", "one-step", "--data", str(folder), "--base", "step", "--name", "whole", "--steps", "2", *SET]
    train += ["--storage", str(tmp_path)]
    succeeded(command(*train, "--run", str(tmp_path / "painter"), "--set", ALONE))
    first = load_denoiser(tmp_path / "whole.safetensors").upsampler
    assert first is not None
    later = ["--run", str(tmp_path / "detail"), "--set", "adversarial=0", "--start-from", "whole"]
    succeeded(command(*train, *later))
    second = load_denoiser(tmp_path / "whole.safetensors").upsampler
    assert second is not None
    assert not torch.equal(first.stem.weight, second.stem.weight)
    refused(command(*train, "--run", str(tmp_path / "other"), "--set", "painter_alone=2"), "painter_alone")


def test_a_start_without_a_painter_goes_on_without(tmp_path: Path) -> None:
    publish_base(tmp_path)
    base = load_denoiser(tmp_path / "step.safetensors")
    own = {"channels": 8, "dilations": (1,), "hidden": 16}  # as the toy's
    publish_toy_upsampler(tmp_path, "whole", base.info, features=8, sampling=SAMPLING.model_dump(mode="json"))
    start, config = load_denoiser(tmp_path / "whole.safetensors"), OneStepConfig(network=own)
    assert make_networks(base, base, (32, 24), config).drawing.upsampler.painter is not None
    assert make_networks(base, start, (32, 24), config).drawing.upsampler.painter is None
    with pytest.raises(TrainerError, match="whole paints no objects"):
        make_networks(base, start, (32, 24), config.model_copy(update={"painter_alone": True}))
