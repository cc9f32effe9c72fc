"""The layout network's training: what it learns, and that it resumes."""

from functools import partial
from pathlib import Path

import pytest
import torch

from shared.checkpoint import load, read_info
from shared.diffusion.layouts import LAYOUTS, LayoutNetwork
from shared.diffusion.model import load_denoiser
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_adapter, publish_toy_denoiser
from tests.trainer.command_line import Command, refused
from tests.trainer.test_positions import rendered
from trainer.runs import Run
from trainer.stages.fit_layouts import fit_layouts


def test_the_layout_network_learns_which_label_stands_where(tmp_path: Path) -> None:
    """The sky is above the boat; both may stand anywhere else."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, count = Vocabulary(("sky", "boat")), 600
    heights = torch.rand(count, 2, generator=generator).sort(1).values  # y from the top: the sky's is the smaller
    positions = torch.stack([torch.rand(count, 2, generator=generator), heights], -1)
    network = fit_layouts(positions, vocabulary, tmp_path, steps=100, shape={"cells": 16})
    drawn = torch.stack([network.draw(torch.ones(2), generator) for _ in range(300)])
    assert float((drawn[:, 0, 1] < drawn[:, 1, 1]).float().mean()) >= 0.75


def test_a_layout_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    assert dataset.positions is not None
    fit = partial(fit_layouts, dataset.positions, dataset.vocabulary, steps=4, shape={"cells": 8})
    whole = fit(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(run: Run) -> None:
        if run.step == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(tmp_path / "parts", on_step=stop)
    again = fit(tmp_path / "parts")
    finished = fit(tmp_path / "parts", on_step=lambda _: pytest.fail("nothing is left to do"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, finished.state_dict()[name])


def test_a_checkpoint_gets_other_layouts(tmp_path: Path, command: Command) -> None:
    """The folders need no pictures. The other weights stay the same, and adapters follow."""
    storage = tmp_path / "storage"
    base = publish_toy_denoiser(storage, "positioned", 0, positions=True)
    publish_toy_adapter(storage, "adapter", base)
    before, weights = load(storage / "positioned.safetensors")
    adapter = read_info(storage / "adapter.safetensors")
    assert command("render", tmp_path / "places", "--scenes", "20", "--no-pictures")[0] == 0
    assert not (tmp_path / "places/iclevr").exists()
    fit = ["fit-layouts", "positioned", "--data", tmp_path / "places", "--storage", storage, "--run", tmp_path / "run"]
    refused(command(*fit, "--set", "width=30"), "width 30 must be a multiple of the 4 heads")
    refused(command(*fit, "--set", "most=9"), "--set most: it has no effect here; fields are cells, dropout, heads")
    assert command(*fit, "--steps", "2", "--set", "width=32")[0] == 0
    info, changed = load(storage / "positioned.safetensors")
    assert (info.config["layouts"]["width"], info.config["layouts"]["most"]) == (32, 3)
    assert {**info.config, "layouts": None} == {**before.config, "layouts": None}
    assert info.training["layouts"] == {"data": "places", "pictures": 60, "steps": 2}
    others = [key for key in weights if not key.startswith(LAYOUTS)]
    assert all(torch.equal(weights[key], changed[key]) for key in others)
    assert len(others) < len(weights)
    adapted = load_denoiser(storage / "adapter.safetensors")  # refuses a base of another digest
    assert isinstance(adapted.layouts, LayoutNetwork)
    assert adapted.info.digest != adapter.digest  # its pictures have changed
    assert torch.equal(adapted.layouts.label.weight, changed[f"{LAYOUTS}label.weight"].float())
