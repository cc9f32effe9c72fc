"""`trainer evaluate --only edits`: which pixels an edit may change, and the command on a toy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from iclevr.studies import edits
from iclevr.studies.edits import CHANGED, IN_A_ROW, KINDS, Editor, Picture, tell
from shared.device import pick_device
from shared.diffusion.edits import with_objects
from shared.edits import Edit, Placed, edited
from tests.toy_checkpoint import publish_toy_denoiser, publish_toys
from tests.trainer.command_line import Command, succeeded
from trainer.studies import two_sample
from trainer.studies.study import Subject
from trainer.studies.two_sample import CROPS, Verdicts


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    publish_toys(tmp_path)
    publish_toy_denoiser(tmp_path, "placing", 0, positions=True, rotations=True, support={"objects": [1, 3]})
    return tmp_path


def test_only_what_changes_away_from_the_object_counts(storage: Path) -> None:
    subject = Subject(storage, storage / "placing.safetensors", pick_device("cpu"), Progress(disable=True))
    editor = Editor(subject)
    before = editor.scene()
    added = next(name for name in editor.denoiser.vocabulary.names if name not in before.names)
    edit = Edit(add=Placed(label=added, x=0.5, y=0.5))
    objects = edited(before.names, [edit])
    row = editor.stepper.new_row(editor.denoiser.vocabulary.multi_hot(before.names), editor.options, 1)
    row.labels = with_objects(before.row.labels, objects, editor.denoiser.vocabulary)
    after = Picture(row, [one.label for one in objects])
    before.pixels = np.zeros((48, 64, 3), np.uint8)
    after.pixels = before.pixels.copy()
    after.pixels[22:26, 30:34] = 255  # where the object is
    after.pixels[:, :, 1] += CHANGED
    assert editor.changed(before, after) == 0
    after.pixels[:2, :3] = CHANGED + 1  # the upper corner, far from the object and its shadows
    share = editor.changed(before, after)
    away = 6 / share
    assert away == pytest.approx(round(away))
    assert 0.5 * 48 * 64 < away < 48 * 64


def test_edited_pictures_are_told_from_fresh_ones_by_those_that_no_network_learnt_from(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(storage, storage / "placing.safetensors", pick_device("cpu"), Progress(disable=True))
    editor = Editor(subject)
    edited_, fresh = ([editor.fresh(["red cube"]) for _ in range(8)] for _ in range(2))
    for one in (*edited_, *fresh):
        one.pixels = np.zeros((16, 16, 3), np.uint8)

    def told(first: Tensor, second: Tensor, *_: object, folds: int, **options: object) -> Verdicts:
        assert len(first) == len(second) == 8 * CROPS
        assert folds == 1
        scores = torch.zeros(2, 8 * CROPS)
        scores[0, : 2 * CROPS] = -1.0  # of two edited pictures: right
        scores[1, :CROPS] = 1.0  # of a fresh one: right, and of the other one wrong
        scores[1, CROPS : 2 * CROPS] = -1.0
        return Verdicts(torch.tensor([0.75]), scores)

    monkeypatch.setattr(edits, "tell_apart", told)
    error = np.std([1.0, 1.0, 1.0, 0.0], ddof=1) / 2
    assert tell(edited_, fresh, subject) == {"told_from_fresh": 0.75, "standard_error": pytest.approx(error)}


def test_each_kind_and_a_chain_are_measured(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sample, "STEPS", 3)
    publish_toys(Path("models"))
    publish_toy_denoiser(Path("models"), "placing", 0, positions=True, rotations=True, support={"objects": [1, 3]})
    succeeded(command("evaluate", "placing", "--only", "edits", "--count", 2, "--out", "."))
    rows = json.loads(Path("edits.json").read_text())["rows"]
    assert [row["edit"] for row in rows[: 1 + len(KINDS)]] == ["no edit", *KINDS]
    assert [row["pictures"] for row in rows] == [2, 2, 2, 2, 2, 1, 1, 8]
    assert f"{IN_A_ROW} in a row" in rows[-2]["edit"]
    assert all(0 <= row["changed_away"] <= row["changed_away_worst"] <= 1 for row in rows[1:-1])
    assert [row["told_from_fresh"] is None for row in rows] == [True] * 7 + [False]
