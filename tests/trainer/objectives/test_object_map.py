"""The stage in which the map of objects learns alone: blocks, targets, what learns, and the command."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from shared.diffusion.model import load_denoiser
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer.objectives.test_one_step import CHANGES, SET, publish_base, write_folder
from trainer.config import with_changes
from trainer.data import as_tensor, load_dataset, to_float
from trainer.data_folder import find_pictures
from trainer.errors import TrainerError
from trainer.objectives.adversary import detail_of
from trainer.objectives.object_map import ObjectMapAlone
from trainer.objectives.one_step import SAMPLING, OneStepConfig, OneStepNetworks, make_networks


@pytest.fixture
def stage(tmp_path: Path) -> tuple[ObjectMapAlone, OneStepNetworks]:
    publish_base(tmp_path)
    base, folder = load_denoiser(tmp_path / "step.safetensors"), write_folder(tmp_path / "data")
    pictures, config = find_pictures([folder], None), with_changes(OneStepConfig(), [*CHANGES, "map_blocks=5"])
    networks = make_networks(base, base, pictures.size, config)
    upsampler = networks.drawing.upsampler.config
    return ObjectMapAlone(load_dataset(folder, size=16), pictures, base, upsampler, config, tmp_path / "run"), networks


def test_targets_are_the_detail_of_whole_renders_at_the_blocks(stage: tuple[ObjectMapAlone, OneStepNetworks]) -> None:
    objective, _ = stage
    labels, at, detail = objective.draw(torch.tensor([0, 1, 2]), slice(1, 3), torch.Generator().manual_seed(0))
    assert (labels.shape, at.shape, detail.shape) == ((2, 24, 5), (2, 5, 2), (2, 5, 48))
    assert torch.equal(labels, objective.labels[objective.trained[1:3]])
    # around the object in column 2 and row 4, but two blocks from the edges
    assert at[..., 0].unique().tolist() == [3]
    assert set(at[..., 1].unique().tolist()) <= {2, 3}
    renders = torch.stack([as_tensor(objective.pictures.read(i)) for i in objective.trained[1:3].tolist()])
    whole = F.pixel_unshuffle(detail_of(to_float(renders), 17), 4)  # (2, 48, 6, 8)
    for i in range(2):
        torch.testing.assert_close(detail[i], whole[i][:, at[i, :, 0], at[i, :, 1]].T, atol=1e-5, rtol=0)


def test_the_map_alone_learns(stage: tuple[ObjectMapAlone, OneStepNetworks]) -> None:
    objective, networks = stage
    inputs = objective.draw(torch.tensor([0, 1, 2]), slice(None), torch.Generator().manual_seed(0))
    learning = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, 1e-2)
    before = objective(networks, *inputs)
    for _ in range(30):
        optimizer.zero_grad()
        objective(networks, *inputs).backward()
        optimizer.step()
    assert objective(networks, *inputs) < 0.8 * before
    of_map = [*networks.drawing.upsampler.objects.parameters(), *networks.drawing.upsampler.drawn.parameters()]  # type: ignore[union-attr]
    assert {id(one) for one in learning} == {id(one) for one in of_map}


def test_without_rotations_there_is_no_map(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "step", 0, positions=True, sampling=SAMPLING.model_dump(mode="json"))
    base = load_denoiser(tmp_path / "step.safetensors")
    with pytest.raises(TrainerError, match="takes no rotations, so there is no map of objects to train"):
        make_networks(base, base, (32, 24), with_changes(OneStepConfig(), ["map_blocks=5"]))


def test_the_command_trains_the_map_first(command: Command, tmp_path: Path) -> None:
    publish_base(tmp_path)
    folder = write_folder(tmp_path / "data")
    train = ["train", "one-step", "--data", str(folder), "--base", "step", "--name", "whole", "--steps", "2", *SET]
    train += ["--storage", str(tmp_path)]
    succeeded(command(*train, "--run", str(tmp_path / "map"), "--set", "map_blocks=5"))
    first = load_denoiser(tmp_path / "whole.safetensors").upsampler
    assert first is not None
    later = ["--run", str(tmp_path / "detail"), "--set", "adversarial=0", "--start-from", "whole"]
    succeeded(command(*train, *later))
    second = load_denoiser(tmp_path / "whole.safetensors").upsampler
    assert second is not None
    assert not torch.equal(first.stem.weight, second.stem.weight)
    refused(command(*train, "--run", str(tmp_path / "other"), "--set", "map_blocks=-1"), "map_blocks")


def test_a_start_without_a_map_goes_on_without(tmp_path: Path) -> None:
    publish_base(tmp_path)
    base = load_denoiser(tmp_path / "step.safetensors")
    own = {"channels": 8, "dilations": (1,), "hidden": 16}  # as the toy's
    publish_toy_upsampler(tmp_path, "whole", base.info, features=8, sampling=SAMPLING.model_dump(mode="json"))
    start, config = load_denoiser(tmp_path / "whole.safetensors"), OneStepConfig(network=own)
    assert make_networks(base, base, (32, 24), config).drawing.upsampler.objects is not None
    assert make_networks(base, start, (32, 24), config).drawing.upsampler.objects is None
    with pytest.raises(TrainerError, match="whole has no map of objects to train"):
        make_networks(base, start, (32, 24), config.model_copy(update={"map_blocks": 5}))
