"""`trainer limit`: fresh renders are scored as samples are, with new placements in every run."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from shared.diffusion.layouts import nearest_pair
from shared.diffusion.model import load_denoiser
from tests.toy_checkpoint import publish_toy_denoiser, publish_toys
from tests.trainer.command_line import Command, refused
from trainer.errors import TrainerError
from trainer.scenes.scene import picture_position
from trainer.studies.limit import distances_of, scene_apart


def test_renders_are_scored_and_follow_from_the_seed(command: Command, tmp_path: Path) -> None:
    publish_toys(tmp_path / "models")
    file = tmp_path / "lists.json"
    file.write_text(json.dumps([["red cube", "blue sphere"], ["gray cylinder"]]))
    figures = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        code, out, err = command(
            "limit", file, "--storage", tmp_path / "models", "--repeats", 2, "--seed", seed,
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
        code, _, err = command("limit", file, *to, "--repeats", 1, "--size", 32, *options)
        assert code == 0, err
        return cast(dict[str, Any], json.loads((tmp_path / "a.json").read_text()))

    figures = [found(), found("--fit", "pad"), found("--fit", "pad", "--keep-padding")]
    assert [(one["size"], one["padding"]) for one in figures] == [(32, "none"), (32, "cut"), (32, "kept")]
    refused(command("limit", tmp_path / "lists.json", "--fit", "crop"), "crop", code=2)


def test_objects_keep_as_far_apart_as_in_a_denoisers_arrangements(command: Command, tmp_path: Path) -> None:
    publish_toys(tmp_path / "models")
    publish_toy_denoiser(tmp_path / "models", "placing", 5, positions=True)
    apart = distances_of(load_denoiser(tmp_path / "models" / "placing.safetensors"))
    assert apart[0] == float("inf")  # a single object has no neighbour
    assert len(apart) == 3
    rng, labels = np.random.default_rng(0), ["red cube", "blue sphere"]
    points = [[picture_position(placed) for placed in scene_apart(labels, rng, [0.0, 0.3])] for _ in range(20)]
    assert min(nearest_pair(torch.tensor(pair)) for pair in points) >= 0.3
    with pytest.raises(TrainerError, match=r"2 objects keep 0\.95 of the picture apart"):
        scene_apart(labels, rng, [0.0, 0.95])
    (tmp_path / "lists.json").write_text(json.dumps([labels]))
    to = ("limit", tmp_path / "lists.json", "--storage", tmp_path / "models", "--repeats", 1, "--placed-as")
    code, _, err = command(*to, "placing", "--json", tmp_path / "a.json")
    assert code == 0, err
    assert json.loads((tmp_path / "a.json").read_text())["placed_as"] == "placing"
    refused(command(*to, "toy"), "toy draws no arrangements")


def test_a_label_that_cannot_be_rendered_is_refused(command: Command, tmp_path: Path) -> None:
    publish_toys(tmp_path / "models")
    (tmp_path / "lists.json").write_text(json.dumps([["red cone"]]))
    refused(command("limit", tmp_path / "lists.json", "--storage", tmp_path / "models"), "red cone")
