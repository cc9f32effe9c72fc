"""The network: shapes, dropped labels, independent rows, and refused configurations."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from shared.diffusion.conditioning import LabelEmbedding
from shared.diffusion.unet import NetworkConfig, UNet, time_features
from shared.options import ConditioningName
from tests.toy_checkpoint import SHAPE, randomize

SMALL = {"num_labels": 5, **SHAPE}


def _network(**changes: Any) -> UNet:
    network = UNet(NetworkConfig.model_validate({**SMALL, **changes}))
    randomize(network, 0)
    return network.eval()


def _inputs(rows: int, size: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 3, size, size, generator=generator)
    labels = (torch.rand(rows, 5, generator=generator) < 0.5).float()
    return x, torch.arange(rows) * 200, labels, torch.ones(rows, dtype=torch.bool)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block": 1},
        {"block": 4},
        {"image_size": 32},
        {"channels": (8,), "encoder_blocks": (2,), "decoder_blocks": (2,), "attention": (True,)},
        {"channels": (8, 8, 16), "encoder_blocks": (0, 2, 1), "decoder_blocks": (1, 2, 1), "attention": (False,) * 3},
        {"conditioning": "channels"},
    ],
)
def test_the_output_has_the_inputs_shape(changes: dict[str, Any]) -> None:
    network = _network(**changes)
    size = changes.get("image_size", 16)
    assert network.image_shape == (3, size, size)
    with torch.no_grad():
        out = network(*_inputs(2, size))
    assert out.shape == (2, 3, size, size)
    assert out.std() > 0.01


def test_many_labels_have_the_same_embedding_alone_and_in_a_batch() -> None:
    """Bit by bit: a matrix product would add them in another order for one row than for many."""
    torch.manual_seed(0)
    conditioning = LabelEmbedding(72, 256).eval()
    conditioning.mix = torch.nn.Identity()
    labels = (torch.rand(32, 72, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    keep = torch.ones(32, dtype=torch.bool)
    with torch.inference_mode():
        batched, _ = conditioning(labels, keep)
        alone = torch.cat([conditioning(labels[i : i + 1], keep[:1])[0] for i in range(32)])
    assert torch.equal(batched, alone)
    torch.testing.assert_close(batched, labels @ conditioning.present)


def test_a_fresh_network_predicts_zero() -> None:
    with torch.no_grad():
        assert UNet(NetworkConfig.model_validate(SMALL))(*_inputs(2)).abs().max() == 0


@pytest.mark.parametrize("conditioning", ["embedding", "channels"])
@torch.no_grad()
def test_labels_are_dropped_per_row(conditioning: ConditioningName) -> None:
    network = _network(conditioning=conditioning)
    x, t, labels, _ = _inputs(2)
    keep = torch.tensor([False, True])
    out = network(x, t, labels, keep)
    others = labels.clone()
    others[0] = 1 - others[0]
    assert torch.equal(network(x, t, others, keep)[0], out[0]), "a dropped row must not see its labels"
    assert torch.equal(network(x, t, others, keep)[1], out[1])
    others = labels.clone()
    others[1] = 1 - others[1]
    changed = network(x, t, others, keep)
    assert torch.equal(changed[0], out[0])
    assert not torch.allclose(changed[1], out[1], atol=1e-3), "a kept row must see its labels"
    kept = network(x, t, labels, torch.tensor([True, True]))
    assert torch.equal(kept[1], out[1])
    assert not torch.allclose(kept[0], out[0], atol=1e-3)


def test_time_features() -> None:
    t = torch.tensor([0, 3])
    features = time_features(t, 4)  # frequencies 1 and 1 / sqrt(10000)
    wanted = [[1, 1, 0, 0], [torch.cos(t[1]), torch.cos(t[1] / 100), torch.sin(t[1]), torch.sin(t[1] / 100)]]
    torch.testing.assert_close(features, torch.tensor(wanted, dtype=torch.float32))


def test_every_parameter_of_the_default_network_gets_a_gradient() -> None:
    network = _network(attention=(True, True)).train()
    x, t, labels, keep = _inputs(4)
    keep[0] = False
    network(x, t, labels, keep).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (8, 16, 32)}, "equally long"),
        ({"channels": (), "encoder_blocks": (), "decoder_blocks": (), "attention": ()}, "at least one level"),
        ({"image_size": 18}, "must be a multiple of 4: block"),
        ({"decoder_blocks": (0, 1)}, "greater than or equal to 1"),
        ({"embedding": 15}, "must be even"),
        ({"channels": (8, 28)}, "do not divide into heads"),
        ({"rotations": True}, "rotations need positions"),
        ({"symmetric": (1,)}, "symmetric labels are for a network that takes rotations"),
        ({"positions": True, "rotations": True, "symmetric": (5,)}, r"symmetric labels \[5\] of 5"),
        ({"chanels": (3,)}, "unknown; did you mean channels"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NetworkConfig.model_validate({**SMALL, **changes})
