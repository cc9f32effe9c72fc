"""On a device that is not the CPU: nothing is computed on two at once. torch's meta device stands in for a GPU.

It has shapes and no values, and refuses tensors of the CPU as a GPU does. What differs on a GPU is in
`shared/device.py`, whose answers for one are put in place here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from shared.diffusion import model, unet
from shared.diffusion.denoise import Stepper, sample
from shared.diffusion.path import NoisePath
from shared.diffusion.unet import NetworkConfig, UNet
from shared.options import SamplerName, SamplingOptions
from tests.paths import ROOT
from tests.trainer.test_positions import rendered
from tests.trainer_fixtures import TINY
from trainer.config import TrainConfig
from trainer.objectives import denoiser as objectives
from trainer.objectives.denoiser import Denoising, make_network

META = torch.device("meta")
SHAPE = NetworkConfig(
    num_labels=4, image_size=16, channels=(8, 16), encoder_blocks=(0, 1), decoder_blocks=(1, 1),
    attention=(False, True), embedding=8, head_channels=8,
)  # fmt: skip


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose noise is drawn on it, as on a GPU. Meta has no generator of its own, and no values to draw."""

    def draw(seeds: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.empty(len(seeds), *shape, device=device)

    monkeypatch.setattr(objectives, "draw_noise", draw)
    return META


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_a_training_step_is_on_one_device(other: torch.device, tmp_path: Path, prediction: str) -> None:
    config = TrainConfig.model_validate({**TINY.model_dump(exclude_unset=True), "prediction": prediction})
    dataset = rendered(tmp_path)
    network, objective = make_network(config, dataset).to(other), Denoising(dataset, config, other)
    drawn = objective.draw(torch.arange(4), slice(0, 4), torch.Generator().manual_seed(0))
    loss = objective(network, *(value.to(other) for value in drawn))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.device == other
    assert {value.grad.device for value in network.parameters() if value.grad is not None} == {other}


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_a_sampling_step_is_on_one_device(other: torch.device, sampler: str) -> None:
    with other:
        network = UNet(SHAPE).eval()
    stepper = Stepper(network, NoisePath.of("cosine", 100, "v"), device=other)
    options = SamplingOptions.model_validate({"sampler": sampler, "steps": 4, "guidance": 2.0})
    rows = [stepper.new_row([1, 0, 0, 1], options, seed) for seed in range(2)]
    for _ in range(2):
        stepper.step(rows)
    assert [row.x.device for row in rows] == [other] * 2


def test_a_tensor_that_was_left_on_the_cpu_is_found() -> None:
    with META:
        network = UNet(SHAPE)
    labels, keep = torch.zeros(1, 4, device=META), torch.ones(1, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="device"):
        network(torch.zeros(1, 3, 16, 16, device=META), torch.zeros(1, dtype=torch.int64, device=META), labels, keep)


def test_float16_holds_what_a_shipped_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without bfloat16: no number is too large for it, and the picture is the same."""
    found = list[Tensor]()
    for dtype in (None, torch.float16):
        monkeypatch.setattr(model, "autocast_dtype", lambda _, dtype=dtype: dtype)
        denoiser = model.load_denoiser(ROOT / "models" / "iclevr-64-1step.safetensors")
        labels = torch.tensor([denoiser.vocabulary.multi_hot(["red cube", "blue sphere"])])
        found.append(sample(denoiser.stepper(engine="torch"), labels, denoiser.options, [3]))
    assert 0 < float((found[0] - found[1]).abs().mean()) < 0.002


def test_fused_attention_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = UNet(SHAPE.model_copy(update={"channels": (8, 16)})).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    given = torch.randn(2, 3, 16, 16), torch.tensor([3, 70]), torch.ones(2, 4), torch.tensor([True, False])
    found = list[Tensor]()
    for fused in (False, True):
        monkeypatch.setattr(unet, "fuses_attention", lambda _, fused=fused: fused)
        found.append(network(*given))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
