"""Rotations of objects: how they enter the network, and how they are drawn."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iclevr.labels import ICLEVR
from shared.diffusion.conditioning import PositionMap
from shared.diffusion.denoise import Stepper, sample
from shared.diffusion.layouts import OUTSIDE, as_rotations, with_positions
from shared.diffusion.model import load_denoiser
from shared.diffusion.path import NoisePath
from shared.diffusion.schedules import alpha_bar
from shared.options import SamplingOptions
from tests.toy_checkpoint import publish_toy_denoiser

QUICK = SamplingOptions(steps=2, guidance=1.0)
LABELS = ICLEVR.multi_hot(["red cube", "blue sphere"])
SYMMETRIC = tuple(i for i, name in enumerate(ICLEVR.names) if not name.endswith("cube"))


def test_a_whole_turn_is_a_circle_and_an_unknown_one_is_zero() -> None:
    found = as_rotations(torch.tensor([0, 0.25, 0.5, 1, math.nan]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0], [0, 1], [-1, 0], [1, 0], [0, 0]]), atol=1e-6, rtol=0)


def test_each_label_adds_its_vectors_by_the_cosine_and_the_sine_of_its_rotation() -> None:
    turned, plain = PositionMap(2, 3, 0.1, rotations=True), PositionMap(2, 3, 0.1)
    torch.nn.init.normal_(turned.rotations)
    labels, places = torch.ones(1, 2), torch.tensor([[[0.2, 0.7], [0.6, 0.1]]])
    rotations = as_rotations(torch.tensor([[0.1, 0.6]]))
    cosines, sines = rotations[0, :, :1] * turned.rotations[0], rotations[0, :, 1:] * turned.rotations[1]
    plain.vectors.data = turned.vectors + cosines + sines
    expected = plain(labels, places, None, 8, 8)
    torch.testing.assert_close(turned(labels, places, rotations, 8, 8), expected)
    plain.vectors.data = turned.vectors.data
    for unknown in (None, torch.zeros(1, 2, 2)):
        torch.testing.assert_close(turned(labels, places, unknown, 8, 8), plain(labels, places, None, 8, 8))


def test_rotations_are_drawn_from_the_pictures_seed(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "turned", 3, positions=True, rotations=True)
    stepper = load_denoiser(tmp_path / "turned.safetensors").stepper(engine="torch")
    one, same, other = (stepper.new_row(LABELS, QUICK, seed) for seed in (5, 5, 6))
    assert one.labels.shape == (len(ICLEVR), 5)
    torch.testing.assert_close(one.labels[:, 3:].norm(dim=1), torch.ones(len(ICLEVR)))
    assert torch.equal(one.labels, same.labels)
    assert not torch.isclose(one.labels[:, 3:], other.labels[:, 3:]).all(1).any()
    moved = stepper.new_row(LABELS, QUICK, 5, torch.full((len(ICLEVR), 2), OUTSIDE))
    assert torch.equal(moved.labels[:, 3:], one.labels[:, 3:])
    assert torch.equal(moved.generator.get_state(), one.generator.get_state())
    every = torch.stack([stepper.new_row(LABELS, QUICK, seed).labels[0, 3:] for seed in range(400)])
    assert every.mean(0).norm() < 4 / math.sqrt(400)  # evenly all around: 4 standard deviations


def test_the_picture_follows_the_rotation(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "turned", 3, positions=True, rotations=True)
    network = load_denoiser(tmp_path / "turned.safetensors").network
    x, t, keep = torch.randn(1, *network.image_shape), torch.tensor([500]), torch.tensor([True])
    positions = torch.full((1, len(ICLEVR), 2), 0.5)

    def prediction(turn: float) -> torch.Tensor:
        rotations = as_rotations(torch.full((1, len(ICLEVR)), turn))
        return network(x, t, with_positions(torch.tensor(LABELS)[None], positions, rotations), keep)

    with torch.inference_mode():
        torch.testing.assert_close(prediction(0.0), prediction(1.0), atol=1e-4, rtol=1e-4)
        assert (prediction(0.0) - prediction(0.5)).abs().max() > 0.01


class Middle:
    """Layouts with every object in the middle of the picture."""

    def draw(self, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.full((*labels.shape, 2), 0.5)


class Recording:
    """A network that predicts zeros and records the labels it is given."""

    image_shape, num_labels = (3, 4, 4), 4

    def __init__(self) -> None:
        self.labels = list[Tensor]()

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        self.labels.append(labels)
        return torch.zeros_like(x)


def test_the_network_sees_no_rotation_of_labels_that_have_none() -> None:
    path, options = NoisePath(alpha_bar("cosine"), "v"), SamplingOptions(steps=3, guidance=2.0)
    seen = []
    for symmetric in ((1, 3), ()):
        network = Recording()
        stepper = Stepper(network, path, layouts=Middle(), rotations=True, symmetric=symmetric)
        sample(stepper, torch.eye(4)[:2], options, [5, 6])
        seen.append(torch.cat(network.labels))
    assert seen[0].shape == (12, 4, 5)  # two rows of each picture and step
    assert not seen[0][:, [1, 3], 3:].any()
    torch.testing.assert_close(seen[0][:, [0, 2], 3:].norm(dim=-1), torch.ones(12, 2))
    assert torch.equal(seen[0][:, [0, 2]], seen[1][:, [0, 2]])  # the random numbers of the others are the same
    torch.testing.assert_close(seen[1][..., 3:].norm(dim=-1), torch.ones(12, 4))


def test_a_picture_does_not_depend_on_rotations_that_labels_do_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_toy_denoiser(tmp_path, "round", 3, positions=True, rotations=True, symmetric=SYMMETRIC)
    publish_toy_denoiser(tmp_path, "all", 3, positions=True, rotations=True)
    rand, turned = torch.rand, torch.tensor([one in SYMMETRIC for one in range(len(ICLEVR))])

    def other_turns(*size: int, **options: object) -> Tensor:
        """Draw as torch, but symmetric labels' rotations differ."""
        drawn: Tensor = rand(*size, **options)  # type: ignore[call-overload]
        return torch.where(turned, 1 - drawn, drawn) if size == (len(ICLEVR),) else drawn

    changes = {}
    for name in ("round", "all"):
        stepper = load_denoiser(tmp_path / f"{name}.safetensors").stepper(engine="torch")
        plain = sample(stepper, torch.tensor(LABELS)[None], QUICK, [5])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", other_turns)
            changes[name] = float((sample(stepper, torch.tensor(LABELS)[None], QUICK, [5]) - plain).abs().max())
    assert changes["round"] == 0
    assert changes["all"] > 0.01
