"""Memorisation: distances in hand-made sets, and the command on a toy."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toy_checkpoint import publish_toys
from tests.trainer.command_line import Command, succeeded
from tests.trainer_fixtures import write_data_folder
from trainer.studies.memorisation import (
    PER_SET,
    Nearest,
    closeness,
    common_label_sets,
    flat_pixels,
    mean_pairwise,
    nearest,
)


def _images(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_nearest_is_found_across_chunks() -> None:
    training, queries = _images(30, 0), _images(5, 1)
    queries[3] = training[22]  # memorised
    found = nearest(flat_pixels(queries), map(flat_pixels, training.split(7)))
    rms = (queries[:, None] - training[None]).square().mean((2, 3, 4)).sqrt()  # (5, 30)
    torch.testing.assert_close(found.distance, rms.min(1).values, rtol=1e-4, atol=1e-3)
    assert found.index.tolist() == rms.argmin(1).tolist()
    assert found.index[3] == 22


def test_copies_are_nearer_than_unseen_pictures() -> None:
    index = torch.zeros(200, dtype=torch.int64)
    unseen = Nearest(torch.linspace(1, 2, 200), index)
    copies = Nearest(torch.cat([torch.zeros(50), torch.linspace(1.5, 2, 150)]), index)
    least, *_, nearer = closeness("pixel", copies, unseen)
    assert (least["generated"], least["other"], nearer["generated"]) == (0, 1, 0.25)
    assert closeness("pixel", unseen, unseen)[-1]["generated"] == pytest.approx(0.01)


def test_diversity_within_groups() -> None:
    alike, apart = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    assert mean_pairwise(torch.stack([alike, apart])) == pytest.approx((0 + (5 + 10 + 5) / 3) / 2)


def test_label_sets_with_enough_pictures() -> None:
    labels = torch.zeros(PER_SET * 2 + 3, 3)
    labels[:PER_SET, 0] = labels[PER_SET : 2 * PER_SET + 1, 1] = labels[2 * PER_SET + 1 :, 2] = 1
    groups = common_label_sets(labels, 9, seed=0)
    assert len(groups) == 2  # the third has two pictures
    for group in groups:
        assert len(set(group.tolist())) == PER_SET
        assert len(labels[group].unique(dim=0)) == 1
    assert len(common_label_sets(labels, 1, seed=0)) == 1
    assert common_label_sets(torch.zeros(PER_SET, 3), 9, seed=0) == []  # unknown labels are no label set


def test_the_command(command: Command) -> None:
    """The held-out pictures are flat colours that training has too; a random network's noise resembles none."""
    write_data_folder(Path("seen"), pictures=24 * PER_SET)
    write_data_folder(Path("unseen"), pictures=24)
    publish_toys(Path("models"))
    at = ("evaluate", "toy", "--only", "coverage", "--trained-on", "seen", "--data", "unseen", "--out", ".")
    out = succeeded(command(*at, "--count", 12))
    rows = json.loads(Path("coverage.json").read_text())["rows"]
    figures = {row["measure"]: (row["generated"], row["other"]) for row in rows}
    near = figures["nearest training picture, pixel distance, median"]
    assert near[0] > 0.1 > 2e-3 > near[1]
    diversity = figures[f"distance within a label set, pixel (24 sets of {PER_SET})"]
    assert diversity[0] > 0.1 > 1e-4 > diversity[1]
    assert all(measure in out for measure in figures)
