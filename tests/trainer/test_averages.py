"""Averaged weights against closed forms on a single number."""

import pytest
import torch
from torch import nn

from trainer.averages import Averages
from trainer.config import TrainConfig


def _model() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def _run(model: nn.Linear, averages: Averages, steps: range) -> None:
    for step in steps:
        nn.init.constant_(model.weight, float(step**2))
        averages.update(step)


def _value(averages: Averages, kind: str) -> float:
    weight = averages.network(kind).weight
    assert isinstance(weight, torch.Tensor)
    return float(weight.detach())


def test_short_is_exponential_from_its_first_step() -> None:
    model = _model()
    averages = Averages(model, TrainConfig(ema_decay=0.9, ema_start=5))
    _run(model, averages, range(12))
    wanted = 25.0  # the weights at step 5
    for step in range(6, 12):
        wanted = 0.9 * wanted + 0.1 * step**2
    assert _value(averages, "short") == pytest.approx(wanted, rel=1e-5)


def test_short_is_the_model_until_its_first_step() -> None:
    model = _model()
    averages = Averages(model, TrainConfig(ema_start=5))
    _run(model, averages, range(5))
    assert averages.network("short") is averages.network("raw") is model
    _run(model, averages, range(5, 6))
    assert averages.network("short") is not model


def test_long_weighs_by_a_power_of_time() -> None:
    model, power, steps = _model(), 3.0, 40
    averages = Averages(model, TrainConfig(ema_power=power))
    _run(model, averages, range(steps))
    # unrolled: step i (from 1) has (1 - beta_i) times every later beta, beta_n = (1 - 1/n)^(power + 1)
    n = torch.arange(1, steps + 1, dtype=torch.float64)
    beta = (1 - 1 / n) ** (power + 1)
    later = beta.flip(0).cumprod(0).flip(0) / beta.clamp(min=1e-300)
    weights = (1 - beta) * later
    assert float(weights.sum()) == pytest.approx(1)
    assert _value(averages, "long") == pytest.approx(float((weights * (n - 1) ** 2).sum()), rel=1e-4)
    # Karras et al. 2024, eq. 121: the profile grows like t^power, so the mean time is (power + 1) / (power + 2)
    assert float((weights * n).sum()) / steps == pytest.approx((power + 1) / (power + 2), abs=0.02)


def test_the_long_average_of_a_short_run_forgets_the_random_weights_and_has_the_buffers() -> None:
    network = nn.BatchNorm1d(1)
    averages = Averages(network, TrainConfig())
    for step, value in enumerate([0.0] + [1.0] * 50):
        nn.init.constant_(network.weight, value)
        network.running_mean = torch.full((1,), value)
        averages.update(step)
    averaged = averages.network("long")
    assert averaged.weight.item() > 0.999
    assert averaged.running_mean.item() > 0.999
