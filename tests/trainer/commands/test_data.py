"""`trainer render`, and `trainer import` of a data set that lacks positions."""

import json
from pathlib import Path

import pytest

from tests.trainer.command_line import Command, refused, succeeded


def test_scenes_are_rendered_at_random_or_from_a_train_file(command: Command) -> None:
    code, _, err = command("render", "data", "--scenes", 8, "--size", 16, "--seed", 3)
    assert (code, "24" in err) == (0, True), err
    succeeded(command("render", "again", "--train", "data/train.json", "--size", 16))
    assert json.loads(Path("again/train.json").read_text()) == json.loads(Path("data/train.json").read_text())
    refused(command("render", "data", "--scenes", 1), "data already holds a data set")


def test_positions_are_located_where_there_are_none(command: Command) -> None:
    assert command("render", "data", "--scenes", 8, "--size", 16)[0] == 0
    refused(command("import", "data"), r"data/positions\.json already exists")
    Path("data/positions.json").unlink()
    succeeded(command("import", "data"))
    assert Path("data/positions.json").exists()
    refused(command("import", "data/train.json"), "say where to: trainer import data/train.json FOLDER")


@pytest.mark.usefixtures("data")
def test_bad_arguments_of_render_are_refused(command: Command) -> None:
    refused(command("render", "out", "--train", "missing.json"), r"'missing\.json' does not exist", 2)
    refused(command("render", "out", "--train", "data/train.json", "--scenes", "2"), "--scenes and --train exclude")
    refused(command("render", "data/train.json", "--scenes", "1", "--size", "16"), r"train\.json")
