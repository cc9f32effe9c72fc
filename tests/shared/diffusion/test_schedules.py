"""Schedules compared with closed forms and diffusers, and their values at both ends."""

import math
from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from shared.diffusion.schedules import SCHEDULES, alpha_bar, betas
from shared.options import ScheduleName

T = 1000


def closed_form(name: str, i: int) -> float:
    """beta_i by the formula, in Python's own floats."""
    u = i / (T - 1)
    if name == "linear":
        return 1e-4 + u * (0.02 - 1e-4)
    if name == "quadratic":
        return (0.01 + u * (math.sqrt(0.02) - 0.01)) ** 2
    if name == "sigmoid":
        return 1e-4 + (0.02 - 1e-4) / (1 + math.exp(-(-6 + 12 * u)))
    f = [math.cos((j / T + 0.008) / 1.008 * math.pi / 2) ** 2 for j in (i, i + 1)]
    return min(1 - f[1] / f[0], 0.999)


def test_registry_holds_every_name_of_the_options() -> None:
    assert set(SCHEDULES) == set(get_args(ScheduleName))


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_betas_and_alpha_bar_follow_the_closed_form(name: ScheduleName) -> None:
    expected = torch.tensor([closed_form(name, i) for i in range(T)], dtype=torch.float64)
    torch.testing.assert_close(betas(name), expected, rtol=1e-10, atol=1e-14)
    product, products = 1.0, []
    for beta in expected.tolist():
        product *= 1 - beta
        products.append(product)
    torch.testing.assert_close(alpha_bar(name), torch.tensor(products, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("linear", "linear"),
        ("quadratic", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sigmoid", "sigmoid"),
    ],
)
def test_schedules_equal_diffusers(name: ScheduleName, theirs: str) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs)
    torch.testing.assert_close(betas(name), scheduler.betas.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(alpha_bar(name), scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", get_args(ScheduleName))
@pytest.mark.parametrize("steps", [10, 1000])
def test_alpha_bar_descends_from_picture_to_noise_and_stays_positive(name: ScheduleName, steps: int) -> None:
    ab = alpha_bar(name, steps)
    assert ab.dtype == torch.float64
    assert ab.shape == (steps,)
    assert bool((ab[1:] < ab[:-1]).all())
    assert float(ab[-1]) > 0
    assert float(ab[0]) < 1
    assert torch.isfinite(torch.logit(ab)).all()


def test_cosine_ends_as_its_docstring_says() -> None:
    ab = alpha_bar("cosine")
    assert float(ab[-1]) == pytest.approx(2.4e-9, rel=0.02)
    ours = 1 / (1 - betas("cosine")).sqrt()
    assert ours[-5:].tolist() == pytest.approx([1.25, 1.33, 1.5, 2.0, 31.6], rel=0.01)
    reports = ours.clone()
    reports[-1] = (1 - 0.9999) ** -0.5  # its clip; the raw beta is 1 there
    amplified = [float(reports[-n:].prod()) for n in (1, 3, 5, 10, T)]
    assert amplified == pytest.approx([100, 300, 500, 1000, 64_000], rel=0.01)
    assert float(ab[-2] * (1 - 0.9999)) == pytest.approx(2.4e-10, rel=0.02)
