"""The study `selection`: what is kept and counted, by hand; the command, with an evaluator of another architecture."""

import json
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from iclevr.labels import ICLEVR
from shared.checkpoint import publish
from shared.evaluator import Evaluator, load_evaluator
from shared.options import attempt_seed, picture_seed
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toys
from tests.trainer.command_line import Command, refused, succeeded
from trainer.score import targets_of
from trainer.studies.selection import Selection, measure
from trainer.studies.study import Subject

LISTS = [["red cube", "blue cube"]] * 12
ATTEMPTS = 3


class Strict(Evaluator):
    """Finds the labels of LISTS, of which the second one only in pictures that are lighter than `limit`."""

    limit = 0.0

    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        found = torch.zeros(len(images), len(self.vocabulary))
        first, second = self.vocabulary.encode(LISTS[0])
        found[:, first] = 1.0
        found[:, second] = (images.mean(dim=(1, 2, 3)) > self.limit).float()
        return found


def test_the_first_exact_attempt_is_kept_and_both_evaluators_judge_it(tmp_path: Path) -> None:
    publish_toys(tmp_path)
    subject = Subject(tmp_path, tmp_path / "toy.safetensors", torch.device("cpu"), Progress(disable=True))
    subject.attempts = ATTEMPTS
    targets = targets_of(LISTS, ICLEVR)
    light = torch.stack(
        [
            subject.sample(targets, [attempt_seed(picture_seed(0, i), n) for i in range(len(LISTS))]).mean(
                dim=(1, 2, 3)
            )
            for n in range(1, ATTEMPTS + 1)
        ]
    )  # (attempts, pictures)
    judge, second = Strict(ICLEVR), Strict(ICLEVR)
    judge.limit, second.limit = (float(light.flatten().sort().values[len(light.flatten()) * k // 8]) for k in (4, 6))
    subject.__dict__["judge"] = judge  # as if it were loaded
    exact = light > judge.limit
    drawn = [int(exact[:, i].int().argmax()) + 1 if exact[:, i].any() else ATTEMPTS for i in range(len(LISTS))]
    kept = [drawn[i] - 1 if exact[:, i].any() else 0 for i in range(len(LISTS))]  # of equals, the first
    assert set(drawn) == {1, 2, 3}
    assert not exact.any(0).all()
    n, rows = len(LISTS), subject.stepper.network_rows / ATTEMPTS / len(LISTS)
    assert measure(subject, second, LISTS) == Selection(
        objects=2,
        first=int(exact[0].sum()) / n,
        selected=int(exact.any(0).sum()) / n,
        second_first=int((light[0] > second.limit).sum()) / n,
        second_selected=sum(float(light[kept[i], i]) > second.limit for i in range(n)) / n,
        attempts=sum(drawn) / n,
        rows=sum(drawn) * rows / n,
        extra_rows=(sum(drawn) - n) * rows / n,
    )


def test_the_second_evaluator_may_have_another_architecture_and_is_not_the_first(command: Command) -> None:
    publish_toys(Path("models"))
    small = Evaluator(ICLEVR, architecture="resnet10")
    publish(
        Path("models"), "second", small.tensors(), kind="evaluator", vocabulary=ICLEVR.names,
        config={"architecture": "resnet10"}, training={},
    )  # fmt: skip
    assert load_evaluator(Path("models/second.safetensors")).architecture == "resnet10"
    study = "evaluate", "toy", "--only", "selection", "--count", 2, "--objects", 2, "--attempts", 2, "--out", "."
    succeeded(command(*study, "--second", "second"))
    (row,) = json.loads(Path("selection.json").read_text())["rows"]
    assert (row["objects"], row["attempts"], row["extra_rows"]) == (2, 2.0, row["rows"] / 2)  # random: never exact
    refused(command(*study, "--second", "toy-evaluator"), "is the evaluator that selects")
    publish_toy_denoiser(Path("models"), "one", 0, vocabulary=Vocabulary(ICLEVR.names[:1]))
    refused(command("evaluate", "one", *study[2:], "--second", "second"), "--objects 2: there are 1 labels")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    publish(
        tmp_path, "odd", Evaluator(ICLEVR).tensors(), kind="evaluator", vocabulary=ICLEVR.names,
        config={"architecture": "resnet50"}, training={},
    )  # fmt: skip
    with pytest.raises(Exception, match="its architecture is 'resnet50'; known are resnet10, resnet18"):
        load_evaluator(tmp_path / "odd.safetensors")
