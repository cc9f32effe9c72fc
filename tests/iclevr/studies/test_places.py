"""`trainer places`: distances by hand, and the command on a toy."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iclevr.labels import ICLEVR
from iclevr.studies.places import judge_places, measure
from shared.diffusion.layouts import positions_at
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toys
from tests.trainer.command_line import Command, succeeded
from trainer.errors import TrainerError


class Given(Evaluator):
    """Finds i-CLEVR's first two labels in every picture, the second at (0.5, 0.5) and all others at (0.2, 0.4)."""

    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        found = torch.zeros(len(images), len(self.vocabulary))
        found[:, self.vocabulary.encode(ICLEVR.names[:2])] = 1
        return found

    def positions(self, images: Tensor, *, batch: int = 64) -> Tensor:
        found = torch.tensor([0.2, 0.4]).expand(len(images), len(self.vocabulary), 2).clone()
        found[:, self.vocabulary.index(ICLEVR.names[1])] = 0.5
        return found


def judged(targets: list[list[int]], wanted: list[Tensor], side: tuple[int, int]) -> tuple[float, float, float | None]:
    asked = torch.zeros(len(targets), 24)
    for i, indices in enumerate(targets):
        asked[i, indices] = 1
    images = torch.zeros(len(targets), 3, *side)
    return judge_places(Given(ICLEVR), images, asked, torch.stack(wanted), side[0] / side[1])


def test_distances_are_in_widths_over_the_objects_that_are_found() -> None:
    wanted = [positions_at([0, 1], [(0.2, 0.8), (0.2, 0.1)], 24), positions_at([0, 2], [(0.2, 0.4), (0.9, 0.9)], 24)]
    accuracy, exact_match, distance = judged([[0, 1], [0, 2]], wanted, (24, 32))
    assert (accuracy, exact_match) == (0.75, 0.5)
    # picture 0: label 0 is 0.4 heights off, label 1 (0.3, 0.4); picture 1: label 0 is right, label 2 is not found
    assert distance == pytest.approx((0.4 * 0.75 + (0.3**2 + 0.3**2) ** 0.5 + 0) / 3)


def test_without_found_objects_at_known_places_there_is_no_distance() -> None:
    assert judged([[5]], [positions_at([5], [(0.2, 0.8)], 24)], (8, 8))[2] is None  # is not found
    found_without_a_place = judged([[0, 1]], [positions_at([1], [(0.5, 0.3)], 24)], (8, 8))
    assert found_without_a_place[2] == pytest.approx(0.2)


def test_all_numbers_of_objects_that_are_drawn_are_measured(command: Command) -> None:
    publish_toys(Path("models"))
    publish_toy_denoiser(Path("models"), "placing", 0, positions=True, rotations=True, support={"objects": [2, 3]})
    succeeded(command("evaluate", "placing", "--only", "places", "--count", 3, "--out", "."))
    figures = json.loads(Path("places.json").read_text())["rows"]
    whose = ("placing", "placing, its own places", "fresh renders")
    assert [(one["objects"], one["pictures"]) for one in figures] == [(n, one) for n in (2, 3) for one in whose]


def test_the_order_of_the_evaluators_labels_does_not_matter(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "placing", 0, positions=True)
    denoiser, turned = load_denoiser(tmp_path / "placing.safetensors"), Vocabulary(("pink cube", *ICLEVR.names[::-1]))
    judges = Given(ICLEVR), Given(turned)
    found = [measure(denoiser, judge, denoiser.options, objects=3, count=9, seed=0) for judge in judges]
    distances = [[one.distance for one in placed] for placed, _ in found]
    assert distances[0] == distances[1]
    assert None not in distances[0]
    digits = Evaluator(Vocabulary(("zero", "one")))
    with pytest.raises(TrainerError, match="the evaluator does not know gray cube, red cube, blue cube and 21 more"):
        measure(denoiser, digits, denoiser.options, objects=3, count=9, seed=0)
