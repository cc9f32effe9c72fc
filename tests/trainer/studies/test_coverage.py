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


def test_the_evaluator_of_any_labels_compares_the_pictures_and_too_many_are_refused(command: Command) -> None:
    publish_toys(Path("models"))
    publish_toy_evaluator(Path("models"), "digits", Vocabulary(("zero", "one")))
    write_data_folder(Path("data"), pictures=48)
    at = ("evaluate", "toy", "--data", "data", "--only", "coverage", "--out", ".")
    succeeded(command("export", "toy-evaluator", "checkpoint.pth"))
    for evaluator in ("checkpoint.pth", "digits"):
        succeeded(command(*at, "--count", 20, "--evaluator", evaluator))
        generated, others = json.loads(Path("coverage.json").read_text())["rows"]
        assert generated["coverage"] == 0 < others["coverage"]  # random noise resembles none of the flat colours
    refused(command(*at, "--count", 25), "at most 24 pictures: half of those with labels")
