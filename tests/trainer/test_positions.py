"""Positions and rotations in training: from the renderer and the data folder to the published checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iclevr.labels import ICLEVR
from iclevr.scenes.render import render
from iclevr.scenes.render_folder import random_scenes, write_folder
from iclevr.scenes.scene import SceneObject
from shared.checkpoint import read_info
from shared.diffusion.layouts import OUTSIDE
from shared.diffusion.model import load_denoiser
from shared.diffusion.unet import NetworkConfig
from shared.options import WITH_POSITIONS, SamplingOptions
from shared.support import support_of as support_of_checkpoint
from tests.trainer_fixtures import TINY
from trainer.data import Dataset, load_dataset, merge
from trainer.errors import TrainerError
from trainer.objectives.denoiser import Denoising, convex_hull, make_network, start_from
from trainer.objectives.layouts import fit_layouts_of
from trainer.runs import Budget
from trainer.score import Watcher
from trainer.train import train

CPU = torch.device("cpu")
NAME = "CLEVR_train_000000_0.png"


def rendered(folder: Path) -> Dataset:
    write_folder(folder, random_scenes(6, 2, 0), seed=0, size=16)
    return load_dataset(folder, size=16)


def test_rendered_pictures_have_their_objects_positions_and_cubes_rotations(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    assert dataset.positions is not None
    assert dataset.rotations is not None
    known = dataset.positions[..., 0] != OUTSIDE
    assert torch.equal(known, dataset.labels > 0)
    assert float(dataset.positions[known].min()) > 0
    assert float(dataset.positions[known].max()) < 1
    first = dataset.positions[dataset.labels.sum(1) == 1]
    assert first[first[..., 0] != OUTSIDE].unique(dim=0).shape == (1, 2)  # the first object stands at the origin
    cubes = torch.tensor([label.endswith("cube") for label in ICLEVR.names])
    torch.testing.assert_close(dataset.rotations.norm(dim=-1), dataset.labels * cubes)
    assert replace(dataset, rotations=None).digest != dataset.digest


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


def test_positions_are_moved_with_a_picture_padded_to_a_square(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", random_scenes(1, 1, 0), seed=0, size=None)  # 320 x 240
    squeezed, padded = (load_dataset(tmp_path / "data", size=32, fit=fit).positions for fit in ("squeeze", "pad"))
    assert squeezed is not None
    assert padded is not None
    at = squeezed[..., 0] != OUTSIDE
    torch.testing.assert_close(padded[at][:, 0], squeezed[at][:, 0])
    torch.testing.assert_close(padded[at][:, 1], (squeezed[at][:, 1] * 240 + 40) / 320)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("positions", [], "it lists each picture's "),
        ("positions", {NAME: [[8.0, 0.25]]}, rf"less than or equal to 1 \(at {NAME}, 0, 0\); .*fractions of width and"),
        ("rotations", {NAME: [1.5]}, rf"less than or equal to 1 \(at {NAME}, 0.*\); .*fraction of a turn or null"),
        ("rotations", {NAME: [0.5, 0.5]}, f'picture "{NAME}" needs one for each of its 1 labels: rotation'),
    ],
)
def test_an_invalid_file_is_refused_with_the_reason(tmp_path: Path, file: str, content: Any, message: str) -> None:
    rendered(tmp_path / "data")
    (tmp_path / f"data/{file}.json").write_text(json.dumps(content))
    with pytest.raises(TrainerError, match=rf"{file}\.json.*{message}"):
        load_dataset(tmp_path / "data", size=16)


def test_all_or_no_folders_have_positions_and_unknown_rotations_are_added(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    with pytest.raises(TrainerError, match=r"positions\.json"):
        merge([dataset, replace(dataset, positions=None)])
    without = replace(dataset, rotations=None)
    assert merge([without, without]).rotations is None
    rotations = merge([without, dataset]).rotations
    assert rotations is not None
    assert not rotations[: len(dataset)].any()
    assert torch.equal(rotations[len(dataset) :], dataset.rotations)


def test_position_dropout_hides_the_positions_of_a_fraction_of_the_pictures(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    config = TINY.model_copy(update={"position_dropout": 0.25})
    index = torch.arange(400) % len(dataset)
    objective = Denoising(dataset, config, CPU)
    labels = objective.draw(index, slice(0, 400), torch.Generator().manual_seed(0))[1]
    assert labels.shape == (400, len(ICLEVR), 5)
    shown = (labels[..., 1] != OUTSIDE).any(1)
    assert 0.65 < float(shown.float().mean()) < 0.85
    assert labels[shown, :, 3:].any()
    assert not labels[~shown, :, 3:].any()


def test_training_can_start_from_a_network_without_positions_and_is_watched_as_it_is_sampled(tmp_path: Path) -> None:
    dataset, storage = rendered(tmp_path / "data"), tmp_path / "storage"
    assert not make_network(TINY.model_copy(update={"rotations": False}), dataset).config.rotations
    without = TINY.model_copy(update={"positions": False})
    for config, name, start in ((without, "plain", None), (TINY, "positioned", "plain")):
        network = make_network(config, dataset)
        if start:
            start_from(network, storage, start, config, dataset)
        layouts = fit_layouts_of(dataset, config, tmp_path / name / "layouts", Budget(steps=2))
        objective = Denoising(dataset, config, CPU, layouts=layouts)
        train(objective, network, config, tmp_path / name, Budget(steps=2), device=CPU)
        objective.publish(network, storage, name, {})
    plain, denoiser = (load_denoiser(storage / f"{name}.safetensors") for name in ("plain", "positioned"))
    assert (plain.layouts, plain.options) == (None, SamplingOptions())
    assert denoiser.options == WITH_POSITIONS
    assert denoiser.layouts is not None
    assert denoiser.layouts.network.config.most == 2
    assert denoiser.network.stem_positions.rotations.any()
    row = denoiser.stepper().new_row(dataset.labels[0], SamplingOptions(), seed=0)
    assert 0 <= float(row.labels[dataset.labels[0] > 0, 1:3].min()) < 1
    watcher = Watcher(
        denoiser.path, dataset.vocabulary, 1.0, tmp_path, {}, None, CPU,
        layouts=denoiser.layouts,
    )  # fmt: skip
    assert torch.equal(watcher.stepper(network).new_row(dataset.labels[0], SamplingOptions(), 0).labels, row.labels)


def test_a_checkpoint_says_what_it_has_learnt(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    for name, config in (("positioned", TINY), ("plain", TINY.model_copy(update={"positions": False}))):
        Denoising(dataset, config, CPU).publish(make_network(config, dataset), tmp_path, name, {})
    support = support_of_checkpoint(read_info(tmp_path / "positioned.safetensors").config)
    assert support.objects == (1, 2)
    assert support.area is not None
    assert support.nearest is not None
    places = json.loads((tmp_path / "data/positions.json").read_text()).values()
    assert all(support.layout_problem(points) is None for points in places)
    assert support.layout_problem([[0.01, 0.01]]) is not None
    lists, turns = (json.loads((tmp_path / f"data/{name}.json").read_text()) for name in ("train", "rotations"))
    turned = {label for name in turns for label, turn in zip(lists[name], turns[name], strict=True) if turn is not None}
    symmetric = tuple(i for i, label in enumerate(ICLEVR.names) if label not in turned)
    assert 0 < len(symmetric) < len(ICLEVR)
    networks = [read_info(tmp_path / f"{name}.safetensors").config["network"] for name in ("positioned", "plain")]
    assert NetworkConfig.model_validate(networks[0]).symmetric == symmetric
    plain = support_of_checkpoint(read_info(tmp_path / "plain.safetensors").config)
    assert (plain.objects, plain.area, plain.nearest) == ((1, 2), None, None)
    assert "symmetric" not in networks[1]


@pytest.mark.parametrize(
    ("points", "corners"),
    [
        ([(0.1, 0.1), (0.9, 0.1), (0.5, 0.2), (0.9, 0.9), (0.1, 0.9), (0.5, 0.5)],
         [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)]),
        ([(0.2, 0.4), (0.2, 0.4)], [(0.2, 0.4)]),
        ([(0.1, 0.1), (0.3, 0.3), (0.2, 0.2)], [(0.1, 0.1), (0.3, 0.3)]),
    ],
)  # fmt: skip
def test_the_convex_hull(points: list[tuple[float, float]], corners: list[tuple[float, float]]) -> None:
    found = convex_hull(torch.tensor(points))
    start = found.index(corners[0])
    assert found[start:] + found[:start] == corners


def test_layouts_are_learnt_from_the_first_folder_that_has_their_number_of_objects(tmp_path: Path) -> None:
    write_folder(tmp_path / "many", random_scenes(4, 3, 0), seed=0, size=16)
    few, many = rendered(tmp_path / "data"), load_dataset(tmp_path / "many", size=16)
    both = merge([few, many])
    assert both.typical is not None
    assert both.typical[: len(few)].all()
    assert torch.equal(both.typical[len(few) :], many.labels.sum(1) == 3)
