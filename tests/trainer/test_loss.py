"""Loss weights and noise levels against closed forms, the draws of a batch, and the loss by hand."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from shared.diffusion.predictions import PredictionName
from shared.diffusion.schedules import ScheduleName, alpha_bar
from shared.vocabulary import Vocabulary
from trainer.config import PRESETS, TrainConfig
from trainer.data import Dataset, settled
from trainer.loss import draw_noise, draw_timesteps, loss_weights, noise_level_weights
from trainer.objectives.denoiser import Denoising, fixed_loss

AB = alpha_bar("cosine", 1000)
SNR = AB / (1 - AB)
CPU = torch.device("cpu")
DATASET = Dataset(Vocabulary(("a", "b")), torch.zeros(50, 3, 4, 4, dtype=torch.uint8), torch.ones(50, 2))


def _config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"noise_levels": "uniform", "loss_weight": "none", **changes})


def test_min_snr_is_the_same_weight_on_x0_for_eps_and_v() -> None:
    eps = loss_weights(_config(prediction="eps", loss_weight="min_snr", min_snr_gamma=4.0), AB)
    v = loss_weights(_config(prediction="v", loss_weight="min_snr", min_snr_gamma=4.0), AB)
    # an error e of x_0 is sqrt(SNR) e in eps and sqrt(SNR + 1) e in v
    wanted = torch.minimum(SNR, torch.tensor(4.0))
    torch.testing.assert_close(eps * SNR, wanted)
    torch.testing.assert_close(v * (SNR + 1), wanted)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("levels", ["uniform", "normal"])
def test_edm_weight_is_that_of_the_paper_with_mean_one(prediction: str, levels: str) -> None:
    config = _config(prediction=prediction, loss_weight="edm", noise_levels=levels, sigma_data=0.2)
    weights = loss_weights(config, AB)
    assert float((weights * noise_level_weights(config, AB)).sum()) == pytest.approx(1)
    sigma2 = 1 / SNR
    on_x0 = (sigma2 + 0.2**2) / (sigma2 * 0.2**2)  # Karras et al. 2022, table 1
    ratio = weights * (SNR.clamp(min=1 / 400) if prediction == "eps" else SNR + 1) / on_x0
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", get_args(ScheduleName))
@pytest.mark.parametrize("prediction", get_args(PredictionName))
@pytest.mark.parametrize("loss_weight", ["none", "min_snr", "edm", "sqrt_snr"])
@pytest.mark.parametrize("levels", ["uniform", "normal"])
def test_no_timestep_takes_the_loss_for_itself(schedule: Any, prediction: str, loss_weight: str, levels: str) -> None:
    """Before the limit eps with EDM's weight spent 99.4 % of its loss on the last of the cosine schedule."""
    config, ab = _config(prediction=prediction, loss_weight=loss_weight, noise_levels=levels), alpha_bar(schedule)
    loss = loss_weights(config, ab) * noise_level_weights(config, ab)
    assert float(loss.max() / loss.sum()) < 0.02


@pytest.mark.parametrize("schedule", ["linear", "quadratic", "cosine", "sigmoid"])
@pytest.mark.parametrize("levels", ["uniform", "normal"])
def test_masses_sum_to_one_and_cover_every_level(schedule: str, levels: str) -> None:
    masses = noise_level_weights(TrainConfig(noise_levels=levels), alpha_bar(schedule))  # type: ignore[arg-type]
    assert float(masses.sum()) == pytest.approx(1)
    assert float(masses.min()) >= 0.01 / 1000 - 1e-12


def test_levels_are_normal_in_log_snr() -> None:
    masses = noise_level_weights(TrainConfig(log_snr_mean=1.0, log_snr_std=1.5), AB)
    log_snr = SNR.log()
    for width, wanted in ((1, 0.683), (2, 0.954)):
        inside = float(masses[(log_snr - 1.0).abs() < width * 1.5].sum())
        assert inside == pytest.approx(wanted, abs=0.02)
    assert float((masses * log_snr).sum()) == pytest.approx(1.0, abs=0.1)


def test_draws_are_stratified() -> None:
    loss, pictures = Denoising(DATASET, _config(), CPU), torch.arange(50)
    x_0, labels, t, eps, keep = loss.draw(pictures, slice(0, 50), torch.Generator().manual_seed(0))
    assert (x_0.shape, eps.shape, labels.shape, keep.shape) == ((50, 3, 4, 4), (50, 3, 4, 4), (50, 2), (50,))
    assert (t.sort().values // 20).tolist() == list(range(50))
    assert t.tolist() != t.sort().values.tolist()


def test_the_reports_timesteps_are_uniform_and_independent() -> None:
    report = PRESETS["report"]
    levels = noise_level_weights(report, AB)
    generator = torch.Generator().manual_seed(0)
    t = torch.stack([draw_timesteps(report, levels, 50, generator) for _ in range(2000)])
    assert (int(t.min()), int(t.max())) == (0, 999)
    counts = torch.bincount(t.flatten(), minlength=1000).float()
    assert float((counts - 100).square().mean()) == pytest.approx(100, rel=0.2)  # the variance of a Poisson count
    assert float(t.float().mean(1).std()) == pytest.approx(1000 / 12**0.5 / 50**0.5, rel=0.1)  # of a mean of 50 draws


@pytest.mark.parametrize(("by", "share"), [("picture", 0.0), ("picture", 0.3), ("batch", 0.3)])
def test_labels_are_dropped_picture_by_picture_or_for_a_whole_batch(by: str, share: float) -> None:
    loss = Denoising(DATASET, _config(label_dropout=share, label_dropout_by=by), CPU)
    generator, index = torch.Generator().manual_seed(0), torch.arange(8)
    batches = torch.stack([loss.draw(index, slice(0, 8), generator)[-1] for _ in range(2000)])
    assert bool((batches == batches[:, :1]).all()) == (by == "batch" or share == 0)
    assert float((~batches).float().mean()) == pytest.approx(share, abs=0.03 if share else 0)


def test_pictures_without_labels_are_only_seen_without_labels() -> None:
    known = torch.tensor([True, False]).repeat(25)
    loss = Denoising(replace(DATASET, labels=DATASET.labels * known[:, None]), _config(label_dropout=0.0), CPU)
    assert torch.equal(loss.draw(torch.arange(50), slice(0, 50), torch.Generator())[-1], known)


def test_noise_levels_and_batch_follow_from_the_data_unless_they_are_set() -> None:
    """Pictures that are all black or all white differ by 1 from their mean."""
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat(25)[:, None, None, None].expand(50, 3, 4, 4)
    dataset = replace(DATASET, images=images)
    found = settled(TrainConfig(), dataset)
    assert (found.sigma_data, found.batch) == (1.0, 8)
    assert found.log_snr_mean == pytest.approx(-0.5 + 2 * math.log(0.15), abs=0.05)
    larger = settled(TrainConfig(image_size=256), dataset)  # Hoogeboom et al. 2023, eq. 8
    assert larger.log_snr_mean == pytest.approx(found.log_snr_mean - 2 * math.log(4), abs=0.1)
    own = settled(TrainConfig(batch=7, log_snr_mean=0.5), dataset)
    assert (own.batch, own.log_snr_mean, own.sigma_data) == (7, 0.5, 1.0)


class Constant(nn.Module):
    """A network that returns `answer` and keeps its input."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        self.x = x
        return self.answer


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_by_hand(prediction: str) -> None:
    config = _config(prediction=prediction, loss_weight="min_snr")
    loss = Denoising(DATASET, config, CPU)
    generator = torch.Generator().manual_seed(1)
    x_0, eps = torch.rand(3, 3, 4, 4, generator=generator), torch.randn(3, 3, 4, 4, generator=generator)
    t, keep, labels = torch.tensor([0, 400, 900]), torch.ones(3, dtype=torch.bool), torch.zeros(3, 2)
    a, s = AB[t].sqrt().float()[:, None, None, None], (1 - AB[t]).sqrt().float()[:, None, None, None]
    target = eps if prediction == "eps" else a * eps - s * x_0
    network = Constant(target)
    assert float(loss(network, x_0, labels, t, eps, keep)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(network.x, a * x_0 + s * eps)
    off = torch.tensor([1.0, 2.0, 3.0])
    total = loss(Constant(target + off[:, None, None, None]), x_0, labels, t, eps, keep)
    assert float(total) == pytest.approx(float((off**2 * loss_weights(config, AB)[t]).mean()), rel=1e-4)


def test_the_fixed_loss_is_the_mean_over_the_same_draws_of_all_batches() -> None:
    class Zero(nn.Module):
        """Predicts nothing, so that the loss is the mean square of the target."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
            return torch.zeros_like(x)

    objective = Denoising(DATASET, _config(prediction="eps"), CPU)
    generator, squares = torch.Generator().manual_seed(0), 0.0
    for index in torch.arange(50).split(20):
        squares += float(objective.draw(index, slice(0, len(index)), generator)[3].square().sum())
    assert fixed_loss(Zero(), objective, batch=20) == pytest.approx(squares / 50 / 48, rel=1e-6)
    assert fixed_loss(Zero(), objective, batch=20, most=7) == fixed_loss(Zero(), objective, batch=20, most=7)


def test_noise_is_drawn_for_each_example_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a process draws only its own share, on its own device (here torch's meta device, which has no values)."""
    seeds = torch.tensor([3, 5, 2**62 - 1])
    noise = draw_noise(seeds, (3, 32, 32), CPU)
    assert torch.equal(draw_noise(seeds[1:], (3, 32, 32), CPU), noise[1:])
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert float((noise[0] * noise[1]).mean()) == pytest.approx(0, abs=0.05)
    on_device = Denoising(DATASET, _config(), CPU)
    on_device.device = torch.device("meta")
    monkeypatch.setattr(
        "trainer.objectives.denoiser.draw_noise",
        lambda seeds, shape, device: torch.empty(len(seeds), *shape, device=device),
    )  # fmt: skip
    drawn = on_device.draw(torch.arange(50), slice(10, 20), torch.Generator().manual_seed(0))
    assert (drawn[3].device.type, drawn[3].shape) == ("meta", (10, 3, 4, 4))
