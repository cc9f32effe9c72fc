"""The layout network's training: what it learns, from what it starts, and how a checkpoint gets it."""

from pathlib import Path

import pytest
import torch

from iclevr.labels import ICLEVR
from shared.checkpoint import load, read_info
from shared.diffusion.layout_draws import LayoutDrawer
from shared.diffusion.layouts import LAYOUTS, OUTSIDE
from shared.diffusion.model import load_denoiser
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_adapter, publish_toy_denoiser
from tests.trainer.command_line import Command, refused
from tests.trainer.test_positions import rendered
from tests.trainer_fixtures import TINY
from trainer.errors import TrainerError
from trainer.objectives.layouts import (
    Arranging,
    LayoutsConfig,
    fit_layouts,
    fit_layouts_of,
    make_network,
    start_from,
)
from trainer.runs import Budget, read_log
from trainer.train import batch_indices


def test_the_layout_network_learns_which_label_stands_where(tmp_path: Path) -> None:
    """The sky is above the boat; both may stand anywhere else. The step that knew held-out layouts best is kept."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, count = Vocabulary(("sky", "boat")), 600
    heights = torch.rand(count, 2, generator=generator).sort(1).values  # y from the top: the sky's is the smaller
    positions = torch.stack([torch.rand(count, 2, generator=generator), heights], -1)
    objective = Arranging(positions, vocabulary, LayoutsConfig(network={"cells": 16}, batch=256, evaluate_every=5))
    network, _, step = fit_layouts(objective, make_network(objective), tmp_path, Budget(steps=100))
    drawer = LayoutDrawer(network)
    drawn = drawer.draw(torch.ones(100, 2), [generator] * 100)
    assert float((drawn[:, 0, 1] < drawn[:, 1, 1]).float().mean()) >= 0.75
    losses = {one["step"]: one["held_out_loss"] for one in read_log(tmp_path / "log.jsonl") if "held_out_loss" in one}
    assert list(losses) == list(range(5, 101, 5))
    assert losses[step] == min(losses.values()) < losses[100]
    best = torch.load(tmp_path / "state.pt", weights_only=True)["best"]
    assert best["step"] == step
    assert all(torch.equal(value, best["weights"][key]) for key, value in network.state_dict().items())


def test_a_batch_has_layouts_of_one_size() -> None:
    positions = torch.full((30, 4, 2), OUTSIDE)
    for i in range(30):
        positions[i, : 1 + i % 3] = torch.rand(1 + i % 3, 2, generator=torch.Generator().manual_seed(i))
    objective = Arranging(positions, Vocabulary(("a", "b", "c", "d")), LayoutsConfig())
    sizes = set()
    for step in range(9):
        index = batch_indices(len(objective), 12, 0, step)
        count, n = objective.draw(index, slice(0, 12), torch.Generator())[0].shape
        sizes.add(n)
        assert count == 12 // n
    assert sizes == {1, 2, 3}


def test_short_runs_fit_layouts_no_longer_than_the_denoiser(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    config = TINY.model_copy(update={"layout_steps": 3})
    for steps, wanted in ((2, 2), (9, 3)):  # the second goes on where the first ended
        fit_layouts_of(dataset, config, tmp_path / "run", Budget(steps=steps))
        assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == wanted


def test_a_run_starts_from_a_former_layout_network_of_other_numbers_of_objects(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "former", 0, positions=True)
    publish_toy_denoiser(tmp_path, "plain", 0)
    shape = {"cells": 4, "width": 8, "layers": 1, "heads": 1}
    drawer = load_denoiser(tmp_path / "former.safetensors").layouts
    assert drawer is not None
    former = drawer.network
    for most in (2, 3, 5):
        positions = torch.full((1, len(ICLEVR), 2), OUTSIDE)
        positions[0, :most] = 0.5
        objective = Arranging(positions, ICLEVR, LayoutsConfig(network=shape))
        network = make_network(objective)
        start_from(network, tmp_path, "former", ICLEVR)
        known = min(most, 3) + 1
        assert torch.equal(network.count.weight[:known], former.count.weight[:known])
        assert torch.equal(network.label.weight, former.label.weight)
    other = make_network(Arranging(positions, ICLEVR, LayoutsConfig(network={**shape, "cells": 8})))
    with pytest.raises(TrainerError, match="former has a layout network of another shape"):
        start_from(other, tmp_path, "former", ICLEVR)
    with pytest.raises(TrainerError, match="plain has no layout network of its own"):
        start_from(network, tmp_path, "plain", ICLEVR)


def test_a_checkpoint_gets_other_layouts(tmp_path: Path, command: Command) -> None:
    """The folders need no pictures. The other weights stay the same, and adapters follow."""
    storage = tmp_path / "storage"
    base = publish_toy_denoiser(storage, "positioned", 0, positions=True)
    publish_toy_adapter(storage, "adapter", base)
    before, weights = load(storage / "positioned.safetensors")
    adapter = read_info(storage / "adapter.safetensors")
    assert command("render", tmp_path / "places", "--scenes", "20", "--no-pictures")[0] == 0
    assert not (tmp_path / "places/iclevr").exists()
    fit = ["train", "layouts", "--name", "positioned", "--data", tmp_path / "places", "--storage", storage]
    fit += ["--run", tmp_path / "run"]
    refused(command(*fit, "--set", "network.width=30"), "width 30 must be a multiple of the 4 heads")
    refused(command(*fit, "--set", "network.most=9"), "network.most cannot be set: it follows from the data")
    refused(command(*fit, "--set", "width=9"), "width: unknown; known are batch")
    assert command(*fit, "--steps", "2", "--set", "network.width=32")[0] == 0
    info, changed = load(storage / "positioned.safetensors")
    assert (info.config["layouts"]["width"], info.config["layouts"]["most"]) == (32, 3)
    assert {**info.config, "layouts": None} == {**before.config, "layouts": None}
    made_by = info.training["layouts"].pop("made_by")
    assert info.training["layouts"] == {"data": "places", "pictures": 60, "steps": 2}
    assert [stage["command"].split()[3:5] for stage in made_by] == [["train", "layouts"]]
    others = [key for key in weights if not key.startswith(LAYOUTS)]
    assert all(torch.equal(weights[key], changed[key]) for key in others)
    assert len(others) < len(weights)
    adapted = load_denoiser(storage / "adapter.safetensors")  # refuses a base of another digest
    assert adapted.layouts is not None
    assert adapted.info.digest != adapter.digest  # its pictures have changed
    assert torch.equal(adapted.layouts.network.label.weight, changed[f"{LAYOUTS}label.weight"].float())
    onward = ["--start-from", "positioned", "--steps", "1", "--set", "network.width=32", "--set", "lr=1e-9"]
    assert command(*fit, *onward, "--run", tmp_path / "onward")[0] == 0
    info, again = load(storage / "positioned.safetensors")
    assert info.training["layouts"]["started_from"] == "positioned"
    assert all(torch.equal(changed[key], again[key]) for key in changed)
