"""Rotations in training: from the renderer to the network."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.diffusion.model import load_denoiser
from shared.options import SamplingOptions
from shared.vocabulary import ICLEVR
from tests.trainer_fixtures import TINY
from trainer.data import Dataset, load_dataset, merge
from trainer.errors import TrainerError
from trainer.objectives.denoiser import Denoising, make_network
from trainer.objectives.distilled import AdaptedNetwork
from trainer.objectives.layouts import fit_layouts_of
from trainer.runs import Budget
from trainer.scenes.render import render
from trainer.scenes.render_folder import random_scenes, write_folder
from trainer.scenes.scene import SceneObject
from trainer.score import Watcher

CPU = torch.device("cpu")
CUBES = torch.tensor([label.endswith("cube") for label in ICLEVR.names])


def rendered(folder: Path) -> Dataset:
    write_folder(folder, random_scenes(6, 3, 0), seed=0, size=16)
    return load_dataset(folder, size=16)


def test_an_object_looks_the_same_where_its_seen_rotation_is_the_same() -> None:
    cube, quarter, less = (SceneObject("cube", "red", 0, 0, turn) for turn in (0.4, 0.4 + np.pi / 2, 0.6))
    assert cube.seen_rotation() == pytest.approx(quarter.seen_rotation())
    assert less.seen_rotation() == pytest.approx(cube.seen_rotation() + 0.2 / (np.pi / 2))
    pictures = render([[cube], [quarter], [less]], samples=1).astype(int)
    assert abs(pictures[0] - pictures[1]).max() <= 1
    assert abs(pictures[0] - pictures[2]).max() > 20
    for shape in ("sphere", "cylinder"):
        one, other = (SceneObject(shape, "red", 0, 0, turn) for turn in (0.4, 1.3))
        assert one.seen_rotation() is None
        pictures = render([[one], [other]], samples=1).astype(int)
        assert abs(pictures[0] - pictures[1]).max() <= 1


def test_rendered_cubes_have_rotations(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    assert dataset.rotations is not None
    lengths = dataset.rotations.norm(dim=-1)
    torch.testing.assert_close(lengths, dataset.labels * CUBES)
    assert load_dataset(tmp_path / "data", size=16, fit="pad").digest == dataset.digest
    assert replace(dataset, rotations=None).digest != dataset.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "maps each picture to its objects' rotations"),
        ('{"CLEVR_train_000000_0.png": [1.5]}', "0 to 1 or null"),
        ('{"CLEVR_train_000000_0.png": [0.5, 0.5]}', 'picture "CLEVR_train_000000_0.png" needs one rotation for each'),
    ],
)
def test_an_invalid_file_is_refused_with_the_reason(tmp_path: Path, content: str, message: str) -> None:
    rendered(tmp_path / "data")
    (tmp_path / "data/rotations.json").write_text(content)
    with pytest.raises(TrainerError, match=rf"rotations\.json: .*{message}"):
        load_dataset(tmp_path / "data", size=16)


def test_a_folder_without_rotations_adds_unknown_ones(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    without = replace(dataset, rotations=None)
    assert merge([without, without]).rotations is None
    rotations = merge([without, dataset]).rotations
    assert rotations is not None
    assert not rotations[: len(dataset)].any()
    assert torch.equal(rotations[len(dataset) :], dataset.rotations)


def test_the_network_takes_them_unless_told_otherwise(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    assert make_network(TINY, dataset).config.rotations
    for changes in ({"rotations": False}, {"positions": False}):
        assert not make_network(TINY.model_copy(update=changes), dataset).config.rotations


def test_a_network_is_watched_as_it_is_sampled_later(tmp_path: Path) -> None:
    dataset, storage = rendered(tmp_path / "data"), tmp_path / "storage"
    network, budget = make_network(TINY, dataset), Budget(steps=2)
    layouts = fit_layouts_of(dataset, TINY, tmp_path / "layouts", budget)
    Denoising(dataset, TINY, CPU, layouts=layouts).publish(network, storage, "turned", {})
    denoiser = load_denoiser(storage / "turned.safetensors")
    watcher = Watcher(
        denoiser.alpha_bar, denoiser.prediction, dataset.vocabulary, 1.0, tmp_path, {}, None, CPU,
        layouts=denoiser.layouts,
    )  # fmt: skip
    wanted = denoiser.stepper().new_row(dataset.labels[0], SamplingOptions(), seed=0)
    for watched in (network, AdaptedNetwork(network, rank=1)):
        row = watcher.stepper(watched).new_row(dataset.labels[0], SamplingOptions(), seed=0)
        assert torch.equal(row.labels, wanted.labels)
