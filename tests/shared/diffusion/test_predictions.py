"""What is predicted: x_0 follows from every prediction, with the coefficients of the papers."""

import pytest
import torch

from shared.diffusion.predictions import PREDICTIONS, PredictionName, shares, to_x0
from shared.diffusion.schedules import alpha_bar

AB = alpha_bar("cosine")
A, S = AB.sqrt(), (1 - AB).sqrt()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_is_recovered_from_an_exact_prediction(prediction: PredictionName) -> None:
    x_0, eps = torch.randn(2, 1000, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, s, of_x_0, of_eps = (one[:, None, None, None] for one in (A, S, *shares(AB, prediction)))
    convert, t = to_x0(AB, prediction), torch.arange(1000)
    x0_hat = convert(a * x_0 + s * eps, of_x_0 * x_0 + of_eps * eps, t)
    limit = convert.limit[:, None, None, None]
    torch.testing.assert_close(x0_hat, x_0.clamp(-limit, limit), rtol=1e-7, atol=1e-7)


def test_flow_is_the_velocity_of_the_straight_path() -> None:
    """On x_u = (1 - u) x_0 + u eps: x_0 = x_u - u velocity. Here x_u is divided by its norm."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    flow = to_x0(alpha_bar("flow"), "flow")
    torch.testing.assert_close(flow.p, ((1 - u) ** 2 + u**2).sqrt())
    torch.testing.assert_close(flow.q, -u)
    assert flow.limit.isinf().all()


def test_eps_and_v_are_those_of_the_papers() -> None:
    eps, v = to_x0(AB, "eps"), to_x0(AB, "v")
    torch.testing.assert_close(eps.p, 1 / A)  # Ho et al. 2020, eq. 15
    torch.testing.assert_close(eps.q, -S / A)
    torch.testing.assert_close(v.p, A)  # Salimans & Ho 2022, appendix D
    torch.testing.assert_close(v.q, -S)
    assert v.limit.isinf().all()
    assert (eps.limit == 1).nonzero().flatten().tolist() == [995, 996, 997, 998, 999]
    for schedule in ("linear", "quadratic", "sigmoid"):
        assert to_x0(alpha_bar(schedule), "eps").limit.isinf().all()
