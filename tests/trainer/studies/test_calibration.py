"""Comparing an evaluator with published scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from shared.evaluator import Evaluator
from shared.vocabulary import ICLEVR
from tests.toy_checkpoint import publish_toys
from tests.trainer.command_line import Command, succeeded
from trainer.errors import TrainerError
from trainer.studies import calibration
from trainer.studies.calibration import Compared, agreement, calibrate, read_pictures


class Reader(Evaluator):
    """An evaluator that finds one label: the one whose index is the picture's red value."""

    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        index = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        return torch.nn.functional.one_hot(index, len(self.vocabulary)).float()


def _set(folder: Path, shown: list[int]) -> None:
    folder.mkdir(parents=True)
    for i, index in enumerate(shown):
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(folder / f"{i:02d}.png")


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Three sets for twelve conditions, labels 0 to 11: 12, 6 and 3 are right, and 1.0, 0.4 and 0.35 published."""
    (tmp_path / "test.json").write_text(json.dumps([[ICLEVR.names[i]] for i in range(12)]))
    entries = []
    for name, right, published in (("a", 12, 1.0), ("b", 6, 0.4), ("c", 3, 0.35)):
        _set(tmp_path / name, [i if i < right else 23 for i in range(12)])
        entries.append({"folder": name, "conditions": "test.json", "official_accuracy": published})
    (tmp_path / "sets.json").write_text(json.dumps(entries))
    return tmp_path


def test_pictures_are_scored_in_the_order_of_their_numbers(sets: Path) -> None:
    found = calibrate(sets, sets, Reader(ICLEVR))
    assert [one.accuracy for one in found] == [1.0, 0.5, 0.25]
    assert [one.difference for one in found] == pytest.approx([0, 0.1, -0.1])
    correlation = float(np.corrcoef([1.0, 0.5, 0.25], [1.0, 0.4, 0.35])[0, 1])
    wanted = {"correlation": correlation, "mean absolute error": 0.2 / 3, "bias": 0}
    assert agreement(found) == pytest.approx(wanted, abs=1e-9)


def test_the_command(command: Command, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_toys(Path("models"))
    monkeypatch.setattr(calibration, "load_evaluator", lambda *_: Reader(ICLEVR))
    at = ("evaluate", "toy-evaluator", "--conditions", sets, "--data", sets, "--out", ".")
    assert "3 published sets: correlation" in succeeded(command(*at))
    assert [one["folder"] for one in json.loads(Path("calibration.json").read_text())["rows"]] == ["a", "b", "c"]


def test_bad_sets_are_refused(sets: Path) -> None:
    with pytest.raises(TrainerError, match="holds 12 numbered PNGs, its conditions file names 13"):
        read_pictures(sets / "a", 13)
    Image.new("RGB", (9, 9)).save(sets / "a" / "04.png")
    with pytest.raises(TrainerError, match="a holds pictures of 2 sizes"):
        read_pictures(sets / "a", 12)
    with pytest.raises(TrainerError, match="the scores of 2 sets have no correlation"):
        agreement([Compared("a", 0.5, 0.25, -0.25), Compared("b", 0.5, 0.5, 0.0)])
    for content in ("{", "[]", '[{"folder": "a"}]', "[1, 2]"):
        (sets / "sets.json").write_text(content)
        with pytest.raises(ValidationError):
            calibrate(sets, sets, Reader(ICLEVR))
