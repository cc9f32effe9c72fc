"""Samplers compared with diffusers on equal noise, with Gaussians of known moments, and with the papers' formulas."""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iclevr.report import REPORT
from shared.diffusion.denoise import Stepper
from shared.diffusion.path import NoisePath
from shared.diffusion.predictions import PredictionName
from shared.diffusion.samplers import Table, _distinct, ddpm, make_table, timesteps
from shared.diffusion.schedules import ScheduleName, alpha_bar, betas
from shared.options import SamplerName, SamplingOptions, SpacingName
from tests.shared.test_options import sampling_options
from tests.toy import ToyNetwork

T = 1000
LINEAR, COSINE, FLOW = alpha_bar("linear"), alpha_bar("cosine"), alpha_bar("flow")
LABELS = [1.0, 0.0, 1.0, 0.0]


# Spacings


@pytest.mark.parametrize("spacing", get_args(SpacingName))
@pytest.mark.parametrize("schedule", get_args(ScheduleName))
@pytest.mark.parametrize("steps", [1, 2, 12, 333, 999, 1000])
def test_timesteps_are_distinct_and_descend_from_the_noisiest(
    spacing: SpacingName, schedule: ScheduleName, steps: int
) -> None:
    t = timesteps(spacing, steps, alpha_bar(schedule)).tolist()
    assert len(t) == steps
    assert t[0] == T - 1
    assert t[-1] >= 0
    assert all(later < earlier for earlier, later in pairwise(t))


@pytest.mark.parametrize("spacing", get_args(SpacingName))
@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_timesteps_are_refused(spacing: SpacingName, steps: int) -> None:
    with pytest.raises(ValueError, match="allowed are 1 to 1000"):
        timesteps(spacing, steps, LINEAR)


def test_uniform_and_trailing_timesteps() -> None:
    assert timesteps("uniform", 999, LINEAR).tolist() == list(range(999, 0, -1))
    assert timesteps("uniform", 4, LINEAR).tolist() == [999, 749, 500, 250]
    assert timesteps("trailing", 4, LINEAR).tolist() == [999, 749, 499, 249]
    assert timesteps("trailing", 1000, LINEAR).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(("ab", "start"), [(LINEAR, float(torch.logit(LINEAR)[-1])), (COSINE, -10.2)])
def test_logsnr_timesteps_are_the_nearest_to_equal_distances(ab: Tensor, start: float) -> None:
    log_snr = torch.logit(ab)
    t = timesteps("logsnr", 9, ab)
    wanted = [start + (float(log_snr[0]) - start) * i / 9 for i in range(9)]
    for chosen, value in list(zip(t.tolist(), wanted, strict=True))[1:]:
        neighbours = log_snr[max(chosen - 1, 0) : chosen + 2]
        assert abs(float(log_snr[chosen]) - value) == float((neighbours - value).abs().min())


# Against diffusers


def theirs(
    scheduler: Any, t: list[int] | int, prediction: PredictionName, ab: Tensor, seed: int, **arguments: Any
) -> Tensor:
    """Run diffusers' loop on the toy denoiser, with noise from a generator with this seed: (1, C, H, W)."""
    network = ToyNetwork(ab, prediction)
    # Theirs is float32, where 1 - alpha_bar loses digits.
    scheduler.alphas_cumprod = ab
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, *network.image_shape), generator=generator)
    scheduler.set_timesteps(**({"num_inference_steps": t} if isinstance(t, int) else {"timesteps": t}))
    for step in scheduler.timesteps:
        out = network(x, step.reshape(1), torch.tensor([LABELS]), torch.tensor([True]))
        x = scheduler.step(out, step, x, generator=generator, **arguments).prev_sample
    return x


def ours(
    make: Callable[[Tensor], Table], t: Tensor, prediction: PredictionName, ab: Tensor, seed: int
) -> tuple[Tensor, int]:
    """Run the stepping loop on the same denoiser, with the table `make(t)`: (1, C, H, W), steps."""
    stepper = Stepper(ToyNetwork(ab, prediction), NoisePath(ab, prediction))
    row = stepper.new_row(LABELS, SamplingOptions(guidance=1.0), seed)
    row.table = make(t)
    row.w = [1.0] * len(row.table)
    while not row.done:
        stepper.step([row])
    return row.x[None], row.step


def config(schedule: ScheduleName, prediction: PredictionName) -> dict[str, Any]:
    return {
        "num_train_timesteps": T,
        "trained_betas": betas(schedule).numpy(),
        "prediction_type": "epsilon" if prediction == "eps" else "v_prediction",
    }


# An eps prediction on cosine is held to [-1, 1] at the noisiest steps, which is ours alone.
CASES = pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("linear", "v"), ("cosine", "v")])


@CASES
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("steps", [7, 100])
def test_ddpm_equals_diffusers(schedule: ScheduleName, prediction: PredictionName, small: bool, steps: int) -> None:
    ab = alpha_bar(schedule)
    t = torch.linspace(T - 1, 0, steps).round().long()  # ends at t = 0, as diffusers adds noise after any other
    variance = "fixed_small" if small else "fixed_large"
    scheduler = DDPMScheduler(**config(schedule, prediction), variance_type=variance, clip_sample=False)
    expected = theirs(scheduler, t.tolist(), prediction, ab, 3)
    actual, taken = ours(lambda t: ddpm(t, ab, small=small), t, prediction, ab, 3)
    assert taken == steps
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@CASES
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_equals_diffusers(schedule: ScheduleName, prediction: PredictionName, eta: float, steps: int) -> None:
    ab = alpha_bar(schedule)
    scheduler = DDIMScheduler(
        **config(schedule, prediction), clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    expected = theirs(scheduler, steps, prediction, ab, 4, eta=eta)
    t = timesteps("trailing", steps, ab)
    assert scheduler.timesteps.tolist() == t.tolist()
    options = SamplingOptions(sampler="ddim", eta=eta, spacing="trailing", steps=steps)
    actual, _ = ours(lambda _: make_table(options, ab), t, prediction, ab, 4)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # in diffusers
@CASES
@pytest.mark.parametrize("spacing", get_args(SpacingName))
@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize(
    ("order", "algorithm", "sampler"),
    [(1, "dpmsolver++", "dpmpp_1"), (2, "dpmsolver++", "dpmpp_2m"), (2, "sde-dpmsolver++", "sde_dpmpp_2m")],
)
def test_dpm_solvers_equal_diffusers(
    schedule: ScheduleName, prediction: PredictionName, spacing: SpacingName, steps: int, order: int, algorithm: str,
    sampler: SamplerName,
) -> None:  # fmt: skip
    ab = alpha_bar(schedule)
    t = timesteps(spacing, steps, ab)
    scheduler = DPMSolverMultistepScheduler(
        **config(schedule, prediction), solver_order=order, algorithm_type=algorithm, final_sigmas_type="zero"
    )
    expected = theirs(scheduler, t.tolist(), prediction, ab, 5)
    options = SamplingOptions(sampler=sampler, spacing=spacing, steps=steps)
    actual, _ = ours(lambda _: make_table(options, ab), t, prediction, ab, 5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("prediction", ["eps", "v"])  # on cosine theirs is inexact: float32, where sigma is 20,000
@pytest.mark.parametrize("spacing", get_args(SpacingName))
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_heun_equals_diffusers(prediction: PredictionName, spacing: SpacingName, steps: int) -> None:
    """An odd number of calls, in which every step but the last is corrected."""
    t = timesteps(spacing, steps, LINEAR)
    scheduler = HeunDiscreteScheduler(**config("linear", prediction))
    scheduler.alphas_cumprod = LINEAR
    scheduler.set_timesteps(timesteps=t.tolist())
    network = ToyNetwork(LINEAR, prediction)
    x = torch.randn((1, *network.image_shape), generator=torch.Generator().manual_seed(5)) / LINEAR[-1].sqrt()
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, step).float()
        out = network(scaled, step.long()[None], torch.tensor([LABELS]), torch.tensor([True]))
        x = scheduler.step(out, step, x).prev_sample
    table = make_table(SamplingOptions(sampler="heun", spacing=spacing, steps=2 * steps - 1), LINEAR)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    actual, calls = ours(lambda _: table, t, prediction, LINEAR, 5)
    assert calls == 2 * steps - 1
    torch.testing.assert_close(actual, x.float(), rtol=0, atol=2e-4)


# Against formulas


def test_the_report_preset_is_algorithm_2_in_the_reports_loop() -> None:
    """Ho et al. 2020, algorithm 2, over range(1, T) with classifier-free guidance, written out once more."""
    options, seed = REPORT.sampling, 6
    network = ToyNetwork(LINEAR, "eps")
    beta = betas("linear").float()
    alpha = 1 - beta
    alpha_hat = torch.cumprod(alpha, dim=0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, *network.image_shape), generator=generator)
    for i in reversed(range(1, T)):
        t, labels = torch.tensor([i]), torch.tensor([LABELS])
        cond = network(x, t, labels, torch.tensor([True]))
        uncond = network(x, t, labels, torch.tensor([False]))
        predicted_noise = torch.lerp(uncond, cond, 3.0)
        noise = torch.randn((1, *network.image_shape), generator=generator) if i > 1 else torch.zeros_like(x)
        mean = (x - (1 - alpha[i]) / torch.sqrt(1 - alpha_hat[i]) * predicted_noise) / torch.sqrt(alpha[i])
        x = mean + torch.sqrt(beta[i]) * noise
    stepper = Stepper(ToyNetwork(LINEAR, "eps"), NoisePath(LINEAR, "eps"))
    row = stepper.new_row(LABELS, options, seed)
    assert row.table.t.tolist() == list(range(999, 0, -1))
    while not row.done:
        stepper.step([row])
    torch.testing.assert_close(row.x[None], x, rtol=0, atol=1e-4)


def test_ddim_is_eulers_method_on_the_straight_path() -> None:
    """Liu et al. 2022: x_u' = x_u + (u' - u) velocity, from u = 1 - 1/2T to 0, on the path itself."""
    table = make_table(SamplingOptions(sampler="ddim", steps=10), FLOW)
    actual, _ = ours(lambda _: table, table.t, "flow", FLOW, 8)
    network = ToyNetwork(FLOW, "flow")
    u = [(t + 0.5) / T for t in table.t.tolist()] + [0.0]
    norm = [math.hypot(1 - one, one) for one in u]
    x = torch.randn((1, *network.image_shape), generator=torch.Generator().manual_seed(8)) * norm[0]
    for i, t in enumerate(table.t):
        x = x + (u[i + 1] - u[i]) * network(x / norm[i], t[None], torch.tensor([LABELS]), torch.tensor([True]))
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_small"])
@pytest.mark.parametrize(("T", "steps"), [(16, 15), (100, 99), (100, 70), (1000, 998), (1000, 700)])
@pytest.mark.parametrize("schedule", get_args(ScheduleName))
def test_ancestral_sampling_ends_without_noise(
    sampler: SamplerName, T: int, steps: int, schedule: ScheduleName
) -> None:
    """Sequences that end at t = 1, as the report's does. The end is x0_hat: nothing of the noisy x is left in it."""
    table = make_table(SamplingOptions(sampler=sampler, steps=steps), alpha_bar(schedule, T))
    t, a, b, c, s = table.rows[-1]
    assert (t, a, c, s) == (1, 0, 0, 0)
    assert b == pytest.approx(1, abs=1e-12)


def test_only_the_reports_own_loop_stops_a_step_before_the_picture() -> None:
    """The noise that it leaves is below a level of 256 with the linear schedule."""
    report = REPORT.sampling
    *_, (t, a, *_) = make_table(report, LINEAR).rows
    assert t == 1
    assert 0.006 < a * math.sqrt(1 - LINEAR[1]) < 2 / 255
    small = make_table(SamplingOptions(sampler="ddpm_small", steps=report.steps), LINEAR)
    assert small.rows[-1][1] == 0


# Against a Gaussian whose denoiser is known: x_0 ~ N(MU, S^2)

MU, S = 0.3, 0.4


def gaussian_x0(x: Tensor, ab: Tensor) -> Tensor:
    """E[x_0 | x_t = x] for x_0 ~ N(MU, S^2)."""
    return MU + ab.sqrt() * S**2 / (ab * S**2 + 1 - ab) * (x - ab.sqrt() * MU)


def moments(table: Table, ab: Tensor) -> tuple[float, float]:
    """Mean and variance of what the table makes of x ~ N(0, 1), exactly: with this denoiser all of it is linear."""
    mean_x, mean_h, var_x, var_h, cov = 0.0, 0.0, 1.0, 0.0, 0.0  # h is the previous x0_hat
    for t, a, b, c, s in table.rows:
        m = float(gaussian_x0(torch.tensor(0.0, dtype=torch.float64), ab[t]))
        k = float(gaussian_x0(torch.tensor(1.0, dtype=torch.float64), ab[t])) - m  # x0_hat = m + k x
        A = a + b * k
        mean_x, mean_h = A * mean_x + b * m + c * mean_h, m + k * mean_x
        var_x, var_h, cov = (
            A**2 * var_x + 2 * A * c * cov + c**2 * var_h + s**2,
            k**2 * var_x,
            A * k * var_x + c * k * cov,
        )
    return mean_x, var_x


@pytest.mark.parametrize(
    ("sampler", "steps", "eta"),
    [
        ("ddpm", 1000, 0.0),
        ("ddpm_small", 1000, 0.0),
        ("ddim", 1000, 0.0),
        ("ddim", 1000, 0.5),
        ("ddim", 1000, 1.0),
        ("euler", 1000, 0.0),
        ("dpmpp_1", 1000, 0.0),
        ("dpmpp_2m", 50, 0.0),
        ("sde_dpmpp_2m", 100, 0.0),
        ("heun", 100, 0.0),
    ],
)
@pytest.mark.parametrize("ab", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
def test_every_sampler_recovers_a_gaussian_exactly(sampler: SamplerName, steps: int, eta: float, ab: Tensor) -> None:
    """The remaining discretisation error is at most 1.9 % of the variance (ddpm_small)."""
    mean, variance = moments(
        make_table(SamplingOptions(sampler=sampler, steps=steps, eta=eta, spacing="logsnr"), ab), ab
    )
    assert mean == pytest.approx(MU, abs=2e-3)
    assert variance == pytest.approx(S**2, rel=0.025)


@pytest.mark.parametrize(
    ("sampler", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_1", 1), ("dpmpp_2m", 2), ("heun", 2)]
)
def test_deterministic_samplers_converge_to_the_flow_at_their_order(sampler: SamplerName, order: int) -> None:
    """The probability flow of a Gaussian keeps (x - mean) / deviation; the error falls with 1 / steps^order."""
    start = LINEAR[-1]
    flow = S / math.sqrt(start * S**2 + 1 - start)  # d x_0 / d x_T
    errors = []
    for steps in (20, 40, 80):
        table = make_table(SamplingOptions(sampler=sampler, steps=steps, spacing="logsnr"), LINEAR)
        errors.append(abs(math.sqrt(moments(table, LINEAR)[1]) - flow))
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 0.85 * 2**order


@cache
def natural_variances(side: int, deviation: float = 0.15) -> tuple[Tensor, Tensor]:
    """Variances of the Fourier coefficients of square pictures whose power falls with 1 / f^2 (Field 1987).

    Also how many coefficients have each. All pictures have the same deviation, and `side` adds finer detail.
    """
    f = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    squares, counts = (f[:, None] ** 2 + f**2).flatten()[1:].unique(return_counts=True)
    return deviation**2 * side**2 / squares / (counts / squares).sum(), counts


def error_of(t: Tensor, options: SamplingOptions, side: int) -> float:
    """Wasserstein distance of what is sampled at `t` from natural pictures, in their deviations."""
    variances, counts = natural_variances(side)
    table = make_table(options, COSINE, t)
    var_x, var_h, cov = torch.ones_like(variances), torch.zeros_like(variances), torch.zeros_like(variances)
    for step, a, b, c, s in table.rows:
        k = COSINE[step].sqrt() * variances / (COSINE[step] * variances + 1 - COSINE[step])  # x0_hat = k x
        A = a + b * k
        var_x, var_h, cov = (
            A**2 * var_x + 2 * A * c * cov + c**2 * var_h + s**2, k**2 * var_x, A * k * var_x + c * k * cov,
        )  # fmt: skip
    wrong = (counts * (var_x.sqrt() - variances.sqrt()) ** 2).sum() / (counts * variances).sum()
    return float(wrong.sqrt())


@pytest.mark.parametrize(("sampler", "steps"), [("dpmpp_2m", 5), ("dpmpp_2m", 8), ("sde_dpmpp_2m", 16)])
@pytest.mark.parametrize(
    ("spacing", "moved"), [("uniform", "every step"), ("logsnr", "every step"), ("logsnr", "the noisy end")]
)
def test_larger_pictures_need_no_other_spacing(
    sampler: SamplerName, steps: int, spacing: SpacingName, moved: str
) -> None:
    """Training shifts its noise levels by 2 log(64 / side) (`trainer.data.settled`). Steps that follow are worse.

    A larger picture has finer detail, too, which is decided where that of the small one was; the spacings cover both.
    """
    options = SamplingOptions(sampler=sampler, steps=steps, spacing=spacing)
    t, log_snr = timesteps(spacing, steps, COSINE), torch.logit(COSINE)
    small = error_of(t, options, 64)
    for side in (128, 256):
        error = error_of(t, options, side)
        assert error < 1.1 * small
        shift = torch.full((steps,), 2 * math.log(64 / side), dtype=torch.float64)
        if moved == "the noisy end":
            levels = log_snr[t]
            shift *= (levels[-1] - levels) / (levels[-1] - levels[0])
        followed = (log_snr - (log_snr[t] + shift)[:, None]).abs().argmin(1)
        assert error_of(_distinct(followed, T), options, side) > 1.05 * error


@given(sampling_options, st.sampled_from(get_args(ScheduleName)))
def test_all_options_give_a_table(options: SamplingOptions, schedule: ScheduleName) -> None:
    table = make_table(options, alpha_bar(schedule))
    assert len(table) == options.steps
    assert all(math.isfinite(number) for row in table.rows for number in row)
