"""Precision, recall, density and coverage against the authors' own code, and the command on a toy."""

import json
from pathlib import Path

import prdc
import pytest
import torch

from shared.vocabulary import ICLEVR, Vocabulary
from tests.toy_checkpoint import publish_toy_evaluator, publish_toys
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder, write_objects_file
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


def test_one_good_picture_is_faithful_and_covers_little() -> None:
    reference = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    figures = compare(reference, reference[:1].repeat(100, 1))
    assert figures.precision == 1
    assert figures.coverage < 0.2
    assert figures.recall == 0
    everything = compare(reference, reference)
    assert (everything.precision, everything.recall, everything.coverage) == (1, 1, 1)


def test_the_command(command: Command) -> None:
    publish_toys(Path("models"))
    data = write_data_folder(Path("data"), pictures=48)
    at = ("coverage", data, "--json", "a.json")
    out = succeeded(command(*at, "--count", 20, "--evaluator", "toy-evaluator"))
    assert "coverage" in out
    generated, renders = json.loads(Path("a.json").read_text())
    assert (generated["evaluator"], generated["pictures"], generated["count"]) == ("toy-evaluator", "generated", 20)
    # a random network's noise resembles none of the flat colours
    assert generated["figures"]["coverage"] == 0
    assert renders["figures"]["coverage"] > 0
    refused(command(*at, "--count", 25), "at most 24 pictures")
    train = json.loads((data / "train.json").read_text())
    (data / "train.json").write_text(json.dumps(dict.fromkeys(train, ()) | dict(list(train.items())[:14])))
    refused(command(*at, "--count", 8), "at most 7 pictures: half of those with labels")
    refused(command(*at, "--evaluator", "toy"), "is of kind denoiser, not evaluator")


def test_evaluators_of_one_file_name_are_told_apart(command: Command) -> None:
    publish_toys(Path("models"))
    data = write_data_folder(Path("data"), pictures=12)
    paths = ["a/checkpoint.pth", "b/checkpoint.pth"]
    for path in paths:
        Path(path).parent.mkdir()
        assert command("export", "toy-evaluator", path)[0] == 0
    code, _, err = command(
        "coverage", data, "--json", "a.json", "--count", 6, "--evaluator", paths[0], "--evaluator", paths[1]
    )
    assert code == 0, err
    assert [one["evaluator"] for one in json.loads(Path("a.json").read_text())] == [paths[0]] * 2 + [paths[1]] * 2


def test_any_evaluators_features_compare_pictures(command: Command) -> None:
    publish_toys(Path("models"))
    publish_toy_evaluator(Path("models"), "digits", Vocabulary(("zero", "one")))
    data = write_data_folder(Path("data"), pictures=12)
    found = []
    for names in (ICLEVR.names, ICLEVR.names[::-1]):
        write_objects_file(data, names)
        succeeded(command("coverage", data, "--json", "a.json", "--count", 6, "--evaluator", "digits"))
        found.append(json.loads(Path("a.json").read_text()))
    assert found[0] == found[1]
