"""The two-sample test of arrangements: it finds the faults of naive priors, and none where there are none."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from iclevr.labels import ICLEVR
from iclevr.scenes.scene import picture_position, place
from shared.diffusion.layouts import OUTSIDE, positions_at
from tests.toy_checkpoint import publish_toy_denoiser
from tests.trainer.command_line import Command, refused, succeeded
from trainer.data import read_arrangements
from trainer.studies.arrangements import accuracy_of_test, compare_arrangements

K = 5


def _scenes(count: int, objects: int, seed: int) -> Tensor:
    """Return positions (N, K, 2) of scenes placed as the renderer places them."""
    rng = np.random.default_rng(seed)
    positions = []
    for _ in range(count):
        points = [picture_position(one) for one in place([("red", "cube")] * objects, rng)]
        positions.append(positions_at(rng.permutation(K)[:objects].tolist(), points, K).round(decimals=4))
    return torch.stack(positions)


class Uniform:
    """Places each object on its own, anywhere."""

    def draw(self, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        drawn = torch.stack([torch.rand(labels.shape[1], 2, generator=generator) for generator in generators])
        return drawn.where(labels[..., None] > 0, torch.tensor(OUTSIDE))


def test_independent_uniform_places_are_found_out() -> None:
    (told,) = compare_arrangements(Uniform(), _scenes(300, 3, 0), count=300, seed=0, advance=lambda n: None)
    assert (told.objects, told.tested) == (3, 300)
    assert told.accuracy >= 0.9


def test_other_arrangements_of_the_same_law_are_not() -> None:
    data = _scenes(400, 3, 1)
    drawn = _scenes(400, 3, 2)
    tested, accuracy = accuracy_of_test(data, drawn, seed=0)
    assert tested == 400
    assert accuracy == pytest.approx(0.5, abs=4 * 0.5 / tested**0.5)


def test_labels_at_the_wrong_places_are_found_out() -> None:
    """The first label is always above the second; the prior exchanges half of them."""
    points = torch.rand(2, 600, 2, 2, generator=torch.Generator().manual_seed(0))
    points[..., 1] = (points[..., 1] + torch.tensor([0.0, 1.0])) / 2
    both = torch.full((2, 600, K, 2), OUTSIDE)
    both[:, :, :2] = points
    data, drawn = both
    drawn[::2, :2] = drawn[::2, :2].flip(1)
    assert accuracy_of_test(data, drawn, seed=0)[1] == pytest.approx(0.75, abs=0.06)


def test_what_cannot_be_tested_is_left_out() -> None:
    """Too few pictures, those without labels, and numbers of objects that are not drawn."""

    class Unknown(Uniform):
        def draw(self, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            return torch.full((*labels.shape, 2), OUTSIDE)

    few = torch.cat([_scenes(49, 2, 0), torch.full((60, K, 2), OUTSIDE)])
    assert compare_arrangements(Uniform(), few, count=99, seed=0, advance=lambda n: None) == []
    assert compare_arrangements(Unknown(), _scenes(60, 2, 0), count=60, seed=0, advance=lambda n: None) == []


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(count)]
    (folder / "objects.json").write_text(json.dumps({name: i for i, name in enumerate(ICLEVR.names)}))
    (folder / "train.json").write_text(json.dumps({name: [ICLEVR.names[i % 24]] for i, name in enumerate(names)}))
    (folder / "positions.json").write_text(json.dumps({name: [rng.random(2).tolist()] for name in names}))
    return folder


def test_the_first_folder_with_a_number_of_objects_counts(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / "one", 3), write_folder(tmp_path / "other", 5)]
    train, positions = (json.loads((folders[1] / name).read_text()) for name in ("train.json", "positions.json"))
    train["4.png"], positions["4.png"] = ["red cube", "blue cube"], [[0.25, 0.5], [0.5, 0.75]]
    (folders[1] / "train.json").write_text(json.dumps(train))
    (folders[1] / "positions.json").write_text(json.dumps(positions))
    found = read_arrangements(folders, ICLEVR)
    assert (found[..., 0] != OUTSIDE).sum(1).tolist() == [1, 1, 1, 2]
    assert found[3, ICLEVR.index("blue cube")].tolist() == [0.5, 0.75]


def test_the_command(command: Command, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 60)
    publish_toy_denoiser(tmp_path / "models", "placing", 0, positions=True)
    at = ("evaluate", "placing", "--only", "arrangements", "--out", ".", "--data")
    out = succeeded(command(*at, data))
    (figures,) = json.loads(Path("arrangements.json").read_text())["rows"]
    assert (figures["objects"], figures["tested"]) == (1, 60)
    assert f"{figures['accuracy']:.4f}" in out
    refused(command(*at, write_folder(tmp_path / "few", 49)), "no number of objects that placing draws has 50 pict")
    (data / "positions.json").unlink()
    refused(command(*at, data), r"data has no positions\.json")
