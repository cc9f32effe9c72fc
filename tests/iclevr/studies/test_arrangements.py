"""Arrangements of i-CLEVR's objects against the renderer's rules, and in the study of `trainer evaluate`."""

import json
from pathlib import Path

import pytest

from iclevr.labels import ICLEVR
from iclevr.scenes.scene import SceneObject, ground_position, picture_position
from iclevr.studies.arrangements import CLEARLY, share_misplaced
from shared.diffusion.layouts import positions_at
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser
from tests.trainer.command_line import Command, succeeded
from tests.trainer.studies.test_arrangements import K, write_folder


@pytest.mark.parametrize(
    ("other", "breach"),
    [
        ((1.45, 0.0), 0.0),  # as near as objects come in the renderer's scenes
        ((1.15, 0.0), 0.3),
        ((3.3, 0.0), 0.3),  # outside the square
        ((-1.5, 1.3), 0.397),  # right behind the other, as the camera is at (7.5, -6.5)
        ((3.0, 3.0), 0.229),  # not wholly in the frame
    ],
)
def test_what_the_renderer_would_not_make(other: tuple[float, float], breach: float) -> None:
    points = [picture_position(SceneObject("cube", "red", x, y, 0.0)) for x, y in [(0.0, 0.0), other]]
    assert ground_position(points[1]) == pytest.approx(other)
    positions = positions_at([0, 3], points, K)[None]
    assert share_misplaced(positions) == (breach > CLEARLY)


def test_only_arrangements_of_i_clevrs_objects_are_measured(command: Command, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 60)
    found = []
    for names in (ICLEVR.names, ("pink cube", *ICLEVR.names)):
        publish_toy_denoiser(tmp_path / "models", "placing", 0, vocabulary=Vocabulary(names), positions=True)
        succeeded(command("evaluate", "placing", "--only", "arrangements", "--out", ".", "--data", data))
        (figures,) = json.loads(Path("arrangements.json").read_text())["rows"]
        found.append(figures["misplaced"])
    assert 0 < found[0] <= 1
    assert found[1] is None
