"""Our Muon against torch's: the same update, the same state."""

import copy

import pytest
import torch
from torch import Tensor, nn

from trainer.muon import Muon, orthogonalised

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(64, 576), (64, 576), (96, 32), (48, 48)]


def _gradient(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """With singular values over two decades, as gradients have, in random directions."""
    rank = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in (rows, columns))
    return (left * torch.logspace(0, -2, rank)) @ right.T


def _weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]


def _step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], number: int) -> list[Tensor]:
    """A step with the gradients of that number; what it changed."""
    generator = torch.Generator().manual_seed(number)
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = _gradient(*weight.shape, generator)
    optimizer.step()
    return [weight.detach() - old for weight, old in zip(weights, before, strict=True)]


def _torchs(weights: list[nn.Parameter]) -> torch.optim.Muon:
    return torch.optim.Muon(weights, 0.02, 0.01, adjust_lr_fn="match_rms_adamw")


def _alike(ours: list[Tensor], torchs: list[Tensor]) -> None:
    """As near as bfloat16 lets two orders of the same products be; measured: cosine 0.9988, difference 5 %."""
    for one, other in zip(ours, torchs, strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.99
        assert (one - other).norm() < 0.1 * other.norm()


def test_steps_are_torchs() -> None:
    ours, torchs = _weights(), _weights()
    first, second = Muon(ours, 0.02, 0.01), _torchs(torchs)
    for number in range(3):
        _alike(_step(first, ours, number), _step(second, torchs, number))


def test_states_are_interchangeable() -> None:
    """A run begun with torch.optim.Muon goes on with ours, and the other way round."""
    first, second = _weights(), _weights()
    torchs, ours = _torchs(first), Muon(second, 0.02, 0.01)
    _step(torchs, first, 0)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert ours.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]
    _alike(_step(ours, second, 1), _step(torchs, first, 1))
    back = _torchs(third := _weights())
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    _alike(_step(ours, second, 2), _step(back, third, 2))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    gradient = _gradient(*shape, torch.Generator().manual_seed(0))
    out = orthogonalised(gradient[None], COEFFICIENTS, 1e-7)[0].float()
    assert out.shape == shape
    values = torch.linalg.svdvals(out)
    assert values.max() < 1.3  # Jordan's polynomial goes from 0.7 to 1.2
    assert values.median() > 0.65
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.cosine_similarity(out.flatten(), (left @ right).flatten(), 0) > 0.95


def test_matrices_without_a_gradient_stay() -> None:
    weights = _weights()
    weights[0].grad = torch.ones_like(weights[0])
    before = [weight.detach().clone() for weight in weights]
    Muon(weights, 0.02, 0.01).step()
    assert [torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)] == [False, True, True, True]
    weights[0].grad.zero_()
    Muon(weights, 0.02, 0.0).step()
    assert weights[0].isfinite().all()
