"""Positions of objects: how they reach the network, and that they replace the drawn ones and nothing else."""

from pathlib import Path

import pytest
import torch

from iclevr.labels import ICLEVR
from service.settings import Settings
from shared.checkpoint import CheckpointError, load, publish
from shared.diffusion.layouts import OUTSIDE, positions_at
from shared.diffusion.model import Denoiser, load_denoiser
from shared.options import SamplingOptions
from tests.toy_checkpoint import publish_toy_denoiser

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
QUICK = SamplingOptions(steps=2, guidance=1.0)


@pytest.fixture
def denoiser(placed: Settings) -> Denoiser:
    return load_denoiser(placed.storage / "placed.safetensors")


def test_each_point_belongs_to_its_label() -> None:
    assert positions_at([2, 0], [(0.25, 0.5), (1, 0)], 3).tolist() == [[1, 0], [OUTSIDE, OUTSIDE], [0.25, 0.5]]


def test_given_positions_replace_the_drawn_ones_and_nothing_else(denoiser: Denoiser) -> None:
    stepper, labels = denoiser.stepper(engine="torch"), ICLEVR.multi_hot(LISTS[0])
    drawn = stepper.new_row(labels, QUICK, 5)
    positions = drawn.labels[:, 1:3]
    assert sorted(torch.nonzero(positions[:, 0] != OUTSIDE).flatten().tolist()) == sorted(ICLEVR.encode(LISTS[0]))
    same = stepper.new_row(labels, QUICK, 5, positions)
    moved = stepper.new_row(labels, QUICK, 5, torch.where(positions == OUTSIDE, positions, 1 - positions))
    assert torch.equal(drawn.x, moved.x)
    rows = [drawn, same, moved]
    stepper.step(rows)
    stepper.step(rows)
    assert torch.equal(drawn.x, same.x)
    assert float((drawn.x - moved.x).abs().max()) > 0.02
    assert torch.equal(drawn.generator.get_state(), moved.generator.get_state())


def test_the_stepper_refuses_positions_that_do_not_fit(denoiser: Denoiser, placed: Settings) -> None:
    labels, positions = ICLEVR.multi_hot(LISTS[0]), torch.full((len(ICLEVR), 2), 0.5)
    with pytest.raises(ValueError, match=r"have shape \(3, 2\), the network takes \(24, 2\)"):
        denoiser.stepper(engine="torch").new_row(labels, QUICK, 5, positions[:3])
    with pytest.raises(ValueError, match="takes no positions"):
        load_denoiser(placed.storage / "toy.safetensors").stepper(engine="torch").new_row(labels, QUICK, 5, positions)


def test_a_layout_network_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "older", 0, positions=True)
    info, tensors = load(tmp_path / "older.safetensors")
    del tensors["layouts.footprint.bias"]
    publish(
        tmp_path, "older", tensors, kind="denoiser", vocabulary=info.vocabulary, config=info.config, training={}
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="layout network is of another version; `trainer train layouts`"):
        load_denoiser(tmp_path / "older.safetensors")
