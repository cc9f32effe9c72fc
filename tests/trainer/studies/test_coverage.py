"""Precision, recall, density and coverage against the authors' own code, and the command on a toy."""

import json
from pathlib import Path

import prdc
import pytest
import torch

from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_evaluator, publish_toys
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder
from trainer.studies.coverage import compare


def test_the_figures_equal_those_of_the_authors() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(70, 6, generator=generator)
    pictures = torch.randn(50, 6, generator=generator) * 0.6 + 0.4
    for k in (3, 5):
        theirs = prdc.compute_prdc(reference.double().numpy(), pictures.double().numpy(), k)
        ours = compare(reference.double(), pictures.double(), k)
        for name, value in theirs.items():
            assert getattr(ours, name) == pytest.approx(float(value), abs=1e-12)
        assert 0 < ours.precision < 1
        assert 0 < ours.coverage < 1


def test_each_evaluator_compares_the_pictures_and_too_many_are_refused(command: Command) -> None:
    """Evaluators of one file name are told apart, and one of other labels has features, too."""
    publish_toys(Path("models"))
    publish_toy_evaluator(Path("models"), "digits", Vocabulary(("zero", "one")))
    write_data_folder(Path("data"), pictures=48)
    names = ["a/checkpoint.pth", "b/checkpoint.pth", "digits"]
    for path in names[:2]:
        Path(path).parent.mkdir()
        succeeded(command("export", "toy-evaluator", path))
    at = ("evaluate", "toy", "--data", "data", "--only", "coverage", "--out", ".")
    succeeded(command(*at, "--count", 20, *(part for name in names for part in ("--evaluator", name))))
    found = json.loads(Path("coverage.json").read_text())["rows"]
    assert [one["evaluator"] for one in found] == [name for name in names for _ in range(2)]
    generated, others = (one["coverage"] for one in found[:2])
    assert generated == 0 < others  # a random network's noise resembles none of the flat colours
    refused(command(*at, "--count", 25), "at most 24 pictures: half of those with labels")
