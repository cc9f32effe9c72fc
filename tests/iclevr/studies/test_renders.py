"""`trainer score --renders`: fresh renders are scored as samples are, with new placements in every run."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from iclevr.labels import ICLEVR
from iclevr.studies.renders import fresh_renders
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_evaluator
from tests.trainer.command_line import Command, refused, succeeded


@pytest.fixture
def score(command: Command) -> Command:
    """Scores renders of two label lists."""
    publish_toy_evaluator(Path("models"), "more", Vocabulary(("pink cube", *ICLEVR.names[::-1])))  # than renders show
    Path("lists.json").write_text(json.dumps([["red cube", "blue sphere"], ["gray cylinder"]]))
    common = (
        "score",
        "lists.json",
        "--repeats",
        1,
        "--renders",
        "--evaluator",
        "more",
        "--json",
        "a.json",
        "--grid",
        "a.png",
    )
    return lambda *options: command(*common, *options)


def figures() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(Path("a.json").read_text()))


def test_renders_are_scored_and_follow_from_the_seed(score: Command) -> None:
    runs, grids = [], []
    for seed in (0, 0, 1):
        assert "fresh renders" in succeeded(score("--repeats", 2, "--seed", seed))
        runs.append(figures()["runs"])
        grids.append(Path("a.png").read_bytes())
    assert [run["seed"] for run in runs[0]] == [0, 1]
    assert set(runs[0][0]["per_label_recall"]) == {"red cube", "blue sphere", "gray cylinder"}
    assert runs[0] == runs[1]
    assert grids[0] == grids[1] != grids[2]
    publish_toy_evaluator(Path("models"), "digits", Vocabulary(("zero", "one")))
    refused(score("--evaluator", "digits"), "the evaluator does not know gray cube, red cube, blue cube and 21")


def test_padded_renders_are_judged_with_or_without_their_padding(score: Command) -> None:
    found = []
    for options in ((), ("--fit", "pad"), ("--fit", "pad", "--keep-padding")):
        succeeded(score("--size", 32, *options))
        found.append((figures()["size"], figures()["padding"]))
    assert found == [(32, "none"), (32, "cut"), (32, "kept")]


def test_scenes_without_a_central_object() -> None:
    lists = [["red cube", "blue sphere"]] * 8
    central, anywhere = (fresh_renders(lists, np.random.default_rng(0), centre=centre).scenes for centre in (1.0, 0.0))
    assert {(one.x, one.y) for one, _ in central} == {(0.0, 0.0)}
    assert all((one.x, one.y) != (0.0, 0.0) for one, _ in anywhere)
    assert [(one.color, one.shape) for one in anywhere[0]] == [("red", "cube"), ("blue", "sphere")]
