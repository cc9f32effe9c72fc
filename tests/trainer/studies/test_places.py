"""`trainer places`: distances by hand, and the command on a toy."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.diffusion.layouts import positions_at
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator
from shared.vocabulary import ICLEVR, Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toys
from tests.trainer.command_line import Command, succeeded
from trainer.errors import TrainerError
from trainer.studies.places import judge_places, measure


class Given(Evaluator):
    """Finds the labels 0 and 1 in every picture, label 1 at (0.5, 0.5) and all others at (0.2, 0.4)."""

    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        found = torch.zeros(len(images), 24)
        found[:, :2] = 1
        return found

    def positions(self, images: Tensor, *, batch: int = 64) -> Tensor:
        found = torch.tensor([0.2, 0.4]).expand(len(images), 24, 2).clone()
        found[:, 1] = 0.5
        return found


def test_distances_are_in_widths_over_the_objects_that_are_found() -> None:
    targets = torch.zeros(2, 24)
    targets[0, [0, 1]] = targets[1, [0, 2]] = 1
    wanted = torch.stack(
        [positions_at([0, 1], [(0.2, 0.8), (0.2, 0.1)], 24), positions_at([0, 2], [(0.2, 0.4), (0.9, 0.9)], 24)]
    )
    accuracy, exact_match, distance = judge_places(Given(ICLEVR), torch.zeros(2, 3, 24, 32), targets, wanted, 0.75)
    assert (accuracy, exact_match) == (0.75, 0.5)
    # picture 0: label 0 is 0.4 heights off, label 1 (0.3, 0.4); picture 1: label 0 is right, label 2 is not found
    assert distance == pytest.approx((0.4 * 0.75 + (0.3**2 + 0.3**2) ** 0.5 + 0) / 3)


def test_without_found_objects_at_known_places_there_is_no_distance() -> None:
    targets = torch.zeros(1, 24)
    targets[0, 5] = 1  # is not found
    wanted = positions_at([5], [(0.2, 0.8)], 24)[None]
    assert judge_places(Given(ICLEVR), torch.zeros(1, 3, 8, 8), targets, wanted, 1.0)[2] is None
    targets[0, [0, 1]] = 1  # are found, but only one of them has a place
    wanted = positions_at([1], [(0.5, 0.3)], 24)[None]
    distance = judge_places(Given(ICLEVR), torch.zeros(1, 3, 8, 8), targets, wanted, 1.0)[2]
    assert distance == pytest.approx(0.2)


def test_an_evaluator_without_a_position_head() -> None:
    torch.manual_seed(0)
    judge, targets = Evaluator(ICLEVR).freeze(), torch.ones(1, 24)
    assert judge_places(judge, torch.zeros(1, 3, 8, 8), targets, torch.zeros(1, 24, 2), 1.0)[2] is None


def test_the_command(command: Command) -> None:
    publish_toys(Path("models"))
    publish_toy_denoiser(Path("models"), "placing", 0, positions=True, rotations=True)
    at = ("evaluate", "placing", "--only", "places", "--count", 3, "--out", ".")
    out = succeeded(command(*at, "--objects", 1, "--objects", 4))
    figures = json.loads(Path("places.json").read_text())
    assert [(one["objects"], one["pictures"]) for one in figures] == [
        (objects, pictures)
        for objects in (1, 4)
        for pictures in ("placing", "placing, its own places", "fresh renders")
    ]  # fmt: skip
    assert "fresh renders" in out
    publish_toy_denoiser(Path("models"), "placing", 0, positions=True, support={"objects": [2, 3]})
    succeeded(command(*at))
    assert [one["objects"] for one in json.loads(Path("places.json").read_text())[::3]] == [2, 3]


class Reordered(Evaluator):
    """Judges as `of` does, with its labels in reverse, after one that it never finds."""

    def __init__(self, of: Evaluator) -> None:
        super().__init__(Vocabulary(("pink cube", *of.vocabulary.names[::-1])))
        self.of = of

    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        return nn.functional.pad(self.of.probabilities(images).flip(1), (1, 0))

    def positions(self, images: Tensor, *, batch: int = 64) -> Tensor | None:
        found = self.of.positions(images)
        return None if found is None else nn.functional.pad(found.flip(1), (0, 0, 1, 0))


def test_the_order_of_the_evaluators_labels_does_not_matter(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "placing", 0, positions=True)
    denoiser, judge = load_denoiser(tmp_path / "placing.safetensors"), Given(ICLEVR)
    found = [measure(denoiser, one, denoiser.options, objects=3, count=9, seed=0) for one in (judge, Reordered(judge))]
    distances = [[one.distance for one in placed] for placed, _ in found]
    assert distances[0] == distances[1]
    assert None not in distances[0]
    digits = Evaluator(Vocabulary(("zero", "one")))
    with pytest.raises(TrainerError, match="the evaluator does not know gray cube, red cube, blue cube and 21 more"):
        measure(denoiser, digits, denoiser.options, objects=3, count=9, seed=0)
