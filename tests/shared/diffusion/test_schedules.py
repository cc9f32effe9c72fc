"""Schedules compared with closed forms."""

import math
from typing import get_args

import pytest
import torch

from shared.diffusion.schedules import ScheduleName, alpha_bar, betas


def closed_form(name: str, i: int, T: int) -> float:
    """beta_i of T by the formula, in Python's own floats."""
    u, scale = i / (T - 1), 1000 / T
    if name == "linear":
        return min(scale * (1e-4 + u * (0.02 - 1e-4)), 0.999)
    if name == "quadratic":
        return min(scale * (0.01 + u * (math.sqrt(0.02) - 0.01)) ** 2, 0.999)
    if name == "sigmoid":
        return min(scale * (1e-4 + (0.02 - 1e-4) / (1 + math.exp(-(-6 + 12 * u)))), 0.999)
    if name == "flow":
        alpha = [(1 - (j + 0.5) / T) ** 2 / ((1 - (j + 0.5) / T) ** 2 + ((j + 0.5) / T) ** 2) for j in (i - 1, i)]
        return 1 - alpha[1] / (alpha[0] if i else 1)
    f = [math.cos((j / T + 0.008) / 1.008 * math.pi / 2) ** 2 for j in (i, i + 1)]
    return min(1 - f[1] / f[0], 0.999)


@pytest.mark.parametrize("name", get_args(ScheduleName))
@pytest.mark.parametrize("T", [10, 1000])
def test_betas_and_alpha_bar_follow_the_closed_form(name: ScheduleName, T: int) -> None:
    expected = torch.tensor([closed_form(name, i, T) for i in range(T)], dtype=torch.float64)
    torch.testing.assert_close(betas(name, T), expected, rtol=1e-10, atol=1e-14)
    product, products = 1.0, []
    for beta in expected.tolist():
        product *= 1 - beta
        products.append(product)
    torch.testing.assert_close(alpha_bar(name, T), torch.tensor(products, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", get_args(ScheduleName))
@pytest.mark.parametrize("T", [16, 100, 4000])
def test_the_last_timestep_is_noise_however_many_there_are(name: ScheduleName, T: int) -> None:
    assert float(alpha_bar(name, T)[-1]) < 0.01  # sampling starts from pure noise
