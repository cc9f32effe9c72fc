"""The contract of all studies: `trainer evaluate` runs each of them alike, on a toy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iclevr.labels import ICLEVR
from shared.checkpoint import read_info, reconfigure
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_evaluator, publish_toy_upsampler, publish_toys
from tests.trainer.command_line import Command, Result, refused, succeeded
from tests.trainer_fixtures import write_data_folder, write_objects_file
from trainer.studies import two_sample
from trainer.studies.study import STUDIES

PICTURES = 60
OF_PICTURES = ["coverage", "spectrum", "two-sample"]
VALUES = {"second": "second"}  # of needs that are no folder of pictures
NEEDS = [(name, need) for name, study in STUDIES.items() for need in study.needs]


@pytest.fixture(autouse=True)
def _files(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a denoiser that takes positions, two evaluators, and a folder of pictures with positions."""
    monkeypatch.setattr(two_sample, "STEPS", 3)
    publish_toys(Path("models"))
    publish_toy_evaluator(Path("models"), "second")
    publish_toy_denoiser(Path("models"), "placing", 0, positions=True)
    # as many as its layout network places; in few steps
    few = {"support": {"objects": [1, 3]}, "sampling": {"steps": 2}}
    reconfigure(Path("models/placing.safetensors"), lambda _: few)
    names = list(json.loads((write_data_folder(Path("data"), PICTURES) / "train.json").read_text()))
    places = np.random.default_rng(0).random((PICTURES, 1, 2)).tolist()
    Path("data/positions.json").write_text(json.dumps(dict(zip(names, places, strict=True))))


def evaluate(command: Command, study: str, *options: object, model: str = "placing", without: str = "") -> Result:
    needed = [need for need in STUDIES[study].needs if need != without]
    given = [part for need in needed for part in (f"--{need.replace('_', '-')}", VALUES.get(need, "data"))]
    few = ("--count", 8, "--seed", 3, "--objects", 2)
    return command("evaluate", model, "--only", study, *given, *few, "--out", "out", *options)


def figures_of(study: str) -> Any:
    return json.loads(Path(f"out/{study}.json").read_text())["rows"]


@pytest.mark.parametrize("study", STUDIES)
def test_figures_follow_from_the_seed_whatever_the_order_of_the_folders_labels(command: Command, study: str) -> None:
    """They are written beside a picture, if the study draws one, and a table is printed."""
    publish_toy_upsampler(Path("models"), "large", read_info(Path("models/placing.safetensors")))
    enough = ("--count", PICTURES) if study == "arrangements" else ()
    found = []
    for names in (ICLEVR.names, ["pink cube", *ICLEVR.names[::-1]]):  # pink is in no picture
        write_objects_file(Path("data"), names)
        assert f"{study}: " in succeeded(evaluate(command, study, *enough, model="large"))
        found.append(figures_of(study))
    assert found[0] == found[1] != []
    if study not in ("coverage", "arrangements", "selection"):
        with Image.open(f"out/{study}.png") as shown:
            assert min(shown.size) > 16


@pytest.mark.parametrize("study", OF_PICTURES)
def test_pictures_without_labels_and_with_unknown_ones(command: Command, study: str) -> None:
    publish_toy_denoiser(Path("models"), "two", 0, vocabulary=Vocabulary(ICLEVR.names[:2]))
    refused(evaluate(command, study, model="two"), "two does not know labels of the folder: blue cube, green cube, b")
    paths = [Path("data/train.json"), Path("data/positions.json")]
    whole = [json.loads(path.read_text()) for path in paths]
    for labelled in (16, 0):  # 2 x 8 are compared
        for path, content in zip(paths, whole, strict=True):
            path.write_text(json.dumps({name: one[: i < labelled] for i, (name, one) in enumerate(content.items())}))
        result = evaluate(command, study)
        succeeded(result) if labelled else refused(result, "none of the pictures has labels")


@pytest.mark.parametrize(("study", "need"), NEEDS)
def test_what_a_study_needs_is_asked_for(command: Command, study: str, need: str) -> None:
    refused(evaluate(command, study, without=need), f"{study} needs --{need.replace('_', '-')}$")


def test_without_only_all_possible_studies_run_and_others_are_noted(command: Command) -> None:
    code, _, err = command("evaluate", "toy", "--data", "data", "--count", 8, "--out", "out")
    assert code == 0, err
    assert {path.stem for path in Path("out").glob("*.json")} == {"coverage", "spectrum", "two-sample"}
    assert "note: arrangements is left out: toy takes no positions" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["placing", "--only", "beauty"], 'no study "beauty"; there are coverage, spectrum'),
        (["toy-evaluator", "--only", "places"], "studies are of denoisers; toy-evaluator is of kind"),
        (["placing", "--only", "places", "--out", "file"], "error: --out file: file is a file, not a folder"),
    ],
)
def test_bad_arguments_are_refused(command: Command, arguments: list[str], message: str) -> None:
    Path("file").touch()
    refused(command("evaluate", *arguments), message)
