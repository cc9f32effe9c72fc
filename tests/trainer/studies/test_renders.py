"""`trainer score --renders`: fresh renders are scored as samples are, with new placements in every run."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np

from shared.vocabulary import ICLEVR, Vocabulary
from tests.toy_checkpoint import publish_toy_evaluator, publish_toys
from tests.trainer.command_line import Command, refused, succeeded
from trainer.studies.renders import fresh_renders


def test_renders_are_scored_and_follow_from_the_seed(command: Command, tmp_path: Path) -> None:
    publish_toys(tmp_path / "models")
    file = tmp_path / "lists.json"
    file.write_text(json.dumps([["red cube", "blue sphere"], ["gray cylinder"]]))
    figures = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        code, out, err = command(
            "score", file, "--renders", "--storage", tmp_path / "models", "--repeats", 2, "--seed", seed,
            "--json", tmp_path / f"{name}.json", "--grid", tmp_path / f"{name}.png",
        )  # fmt: skip
        assert code == 0, err
        assert "fresh renders" in out
        figures.append(json.loads((tmp_path / f"{name}.json").read_text())["runs"])
    assert [run["seed"] for run in figures[0]] == [0, 1]
    assert figures[0] == figures[1]
    grids = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert grids[0] == grids[1] != grids[2]


def test_padded_renders_are_judged_with_or_without_their_padding(command: Command, tmp_path: Path) -> None:
    publish_toys(tmp_path / "models")
    (tmp_path / "lists.json").write_text(json.dumps([["red cube", "blue sphere"]]))

    def found(*options: object) -> dict[str, Any]:
        file, to = tmp_path / "lists.json", ("--storage", tmp_path / "models", "--json", tmp_path / "a.json")
        code, _, err = command("score", file, "--renders", *to, "--repeats", 1, "--size", 32, *options)
        assert code == 0, err
        return cast(dict[str, Any], json.loads((tmp_path / "a.json").read_text()))

    figures = [found(), found("--fit", "pad"), found("--fit", "pad", "--keep-padding")]
    assert {one["evaluator"] for one in figures} == {"toy-evaluator"}
    assert [(one["size"], one["padding"]) for one in figures] == [(32, "none"), (32, "cut"), (32, "kept")]
    refused(command("score", tmp_path / "lists.json", "--renders", "--fit", "crop"), "crop", code=2)


def test_scenes_without_a_central_object() -> None:
    lists = [["red cube", "blue sphere"]] * 8
    central, anywhere = (fresh_renders(lists, np.random.default_rng(0), centre=centre).scenes for centre in (1.0, 0.0))
    assert {(one.x, one.y) for one, _ in central} == {(0.0, 0.0)}
    assert all((one.x, one.y) != (0.0, 0.0) for one, _ in anywhere)
    assert [(one.color, one.shape) for one in anywhere[0]] == [("red", "cube"), ("blue", "sphere")]


def test_more_objects_than_the_task_has(command: Command, tmp_path: Path) -> None:
    publish_toys(tmp_path / "models")
    (tmp_path / "lists.json").write_text(json.dumps([list(ICLEVR.names[:8])]))
    to = ("--storage", tmp_path / "models", "--json", tmp_path / "a.json")
    code, _, err = command("score", tmp_path / "lists.json", "--renders", *to, "--repeats", 1, "--centre", 0)
    assert code == 0, err
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["centre"] == 0
    assert 0 <= figures["exact_match"]["mean"] <= 1


def test_an_evaluator_may_know_more_than_renders_show(command: Command, tmp_path: Path) -> None:
    publish_toy_evaluator(tmp_path, "more", Vocabulary(("pink cube", *ICLEVR.names[::-1])))
    publish_toy_evaluator(tmp_path, "digits", Vocabulary(("zero", "one")))
    (tmp_path / "lists.json").write_text(json.dumps([["red cube", "blue sphere"]]))
    at = ("score", tmp_path / "lists.json", "--renders", "--storage", tmp_path, "--json", tmp_path / "a.json")
    succeeded(command(*at, "--repeats", 1, "--evaluator", "more"))
    recall = json.loads((tmp_path / "a.json").read_text())["runs"][0]["per_label_recall"]
    assert set(recall) == {"red cube", "blue sphere"}
    refused(command(*at, "--evaluator", "digits"), "the evaluator does not know gray cube, red cube, blue cube and 21")


def test_a_label_that_cannot_be_rendered_is_refused(command: Command, tmp_path: Path) -> None:
    publish_toys(tmp_path / "models")
    (tmp_path / "lists.json").write_text(json.dumps([["red cone"]]))
    refused(command("score", tmp_path / "lists.json", "--renders", "--storage", tmp_path / "models"), "red cone")
