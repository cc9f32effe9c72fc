"""The denoiser: its checkpoint, and what it may start from. Its loss is tested in tests/trainer/test_loss.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.options import SamplingOptions
from shared.vocabulary import Vocabulary
from tests.trainer_fixtures import NETWORK, TINY, write_data_folder
from trainer.config import TrainConfig
from trainer.data import Dataset, load_dataset
from trainer.errors import TrainerError
from trainer.objectives.denoiser import Denoising, make_network, start_from
from trainer.runs import Budget
from trainer.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_data_folder(tmp_path_factory.mktemp("data") / "d"), size=16)


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**TINY.model_dump(), **changes})


def test_it_learns_to_predict_noise(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.train.LOG_EVERY", 20)
    config = _config(prediction="eps", loss_weight="none", noise_levels="uniform", schedule="sigmoid", lr=5e-3)
    losses: list[float] = []
    train(
        Denoising(dataset, config, CPU), make_network(config, dataset), config, tmp_path, Budget(steps=80), device=CPU,
        on_step=lambda run: losses.append(run.loss),
    )  # fmt: skip
    assert losses[-1] < 0.75  # measured: 0.67; a fresh network predicts no noise, whose variance is 1


def test_it_learns_a_flow_along_the_straight_path(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.train.LOG_EVERY", 20)
    tiny = TINY.model_dump(exclude={"schedule"})
    config = TrainConfig.model_validate({**tiny, "prediction": "flow", "loss_weight": "none", "lr": 5e-3})
    assert (config.schedule, TrainConfig(prediction="flow", schedule="cosine").schedule) == ("flow", "cosine")
    objective, network, losses = Denoising(dataset, config, CPU), make_network(config, dataset), list[float]()
    train(
        objective, network, config, tmp_path / "run", Budget(steps=120), device=CPU,
        on_step=lambda run: losses.append(run.loss),
    )  # fmt: skip
    assert losses[-1] < 0.85 * losses[20]  # a fresh network predicts no velocity; 0 before the first LOG_EVERY steps
    denoiser = load_denoiser(objective.publish(network, tmp_path, "flow", {}))
    assert (denoiser.prediction, denoiser.info.config["schedule"]) == ("flow", "flow")
    images = sample(denoiser.stepper(), dataset.labels[:2], SamplingOptions(sampler="ddim", steps=4), [1, 2])
    assert images.isfinite().all()


@pytest.mark.parametrize("conditioning", ["embedding", "channels"])
def test_a_published_denoiser_loads_and_samples(dataset: Dataset, tmp_path: Path, conditioning: str) -> None:
    config = _config(network={**NETWORK, "conditioning": conditioning}, prediction="eps", schedule="sigmoid")
    objective, network = Denoising(dataset, config, CPU), make_network(config, dataset)
    train(objective, network, config, tmp_path / "run", Budget(steps=1), device=CPU)
    denoiser = load_denoiser(objective.publish(network, tmp_path, "tiny", {"note": 1}))
    assert (denoiser.prediction, denoiser.info.name, len(denoiser.alpha_bar)) == ("eps", "tiny", 1000)
    assert (denoiser.vocabulary, denoiser.info.training) == (dataset.vocabulary, {"note": 1})
    for key, value in network.state_dict().items():
        torch.testing.assert_close(denoiser.network.state_dict()[key], value, rtol=0.01, atol=1e-3)
    images = sample(denoiser.stepper(), dataset.labels[:2], SamplingOptions(steps=2), [1, 2])
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()


def test_a_deeper_network_starts_as_the_one_that_it_starts_from(dataset: Dataset, tmp_path: Path) -> None:
    config = _config()
    published = make_network(config, dataset)
    for parameter in published.parameters():  # a fresh network predicts zero whatever its blocks do
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.bfloat16().float()  # as it is published
    Denoising(dataset, config, CPU).publish(published, tmp_path, "shallow", {})
    blocks = [count + 1 for count in published.config.decoder_blocks]
    deeper = _config(network={**config.network, "decoder_blocks": blocks})
    x, t, keep = torch.randn(2, 3, 16, 16), torch.tensor([3, 500]), torch.tensor([True, False])
    for its in (config, deeper):
        network = make_network(its, dataset)
        start_from(network, tmp_path, "shallow", its, dataset)
        torch.testing.assert_close(network(x, t, dataset.labels[:2], keep), published(x, t, dataset.labels[:2], keep))

    Denoising(dataset, deeper, CPU).publish(network, tmp_path, "deep", {})
    for name, other, message in (
        ("deep", config, "deep has another network than this run"),
        ("shallow", _config(schedule="linear"), "shallow has another schedule than this run"),
    ):
        with pytest.raises(TrainerError, match=message):
            start_from(make_network(other, dataset), tmp_path, name, other, dataset)
    turned = replace(dataset, vocabulary=Vocabulary(dataset.vocabulary.names[::-1]))
    with pytest.raises(TrainerError, match="deep has another vocabulary than the data set"):
        start_from(network, tmp_path, "deep", deeper, turned)
