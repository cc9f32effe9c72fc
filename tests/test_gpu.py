"""On a GPU: what is computed there equals what a CPU computes. `make gpu-report` runs these; elsewhere they skip."""

from pathlib import Path

import pytest
import torch

from shared import device as devices
from shared.device import fast, lost
from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from tests.paths import ROOT
from tests.trainer.test_positions import rendered
from tests.trainer_fixtures import TINY
from trainer.objectives.denoiser import Denoising, make_network
from trainer.runs import Budget
from trainer.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MODELS = ROOT / "models"


@pytest.mark.parametrize(("dtype", "apart"), [(None, 0.02), ("fastest", 0.3)])
@pytest.mark.parametrize("name", ["iclevr-64", "iclevr-64-labels", "iclevr-320x240"])
def test_pictures_are_those_of_the_cpu(
    name: str, dtype: str | None, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype is None:
        monkeypatch.setattr("shared.diffusion.model.autocast_dtype", lambda _: None)
    found = []
    for device in (CPU, GPU):
        denoiser = load_denoiser(MODELS / f"{name}.safetensors", device=device)
        labels = torch.tensor([denoiser.vocabulary.multi_hot(["red cube", "blue sphere"])] * 2)
        found.append(sample(denoiser.stepper(engine="torch"), labels, denoiser.options, [3, 4]))
    difference = (found[0] - found[1]).abs()
    assert float(difference.mean()) < apart / 10
    assert float(difference.quantile(0.99) if difference.numel() < 2**24 else difference.mean()) < apart


def test_verdicts_are_those_of_the_cpu() -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    there, here = (
        load_evaluator(MODELS / "iclevr-resnet18.safetensors", one).probabilities(images) for one in (GPU, CPU)
    )
    torch.testing.assert_close(there.cpu(), here.cpu(), rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_a_run_learns_and_resumes(dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loss scaled in float16, and with examples that a thread draws."""
    monkeypatch.setattr(devices, "autocast_dtype", lambda _: dtype)
    dataset, config = rendered(tmp_path / "data"), TINY.model_copy(update={"optimizer": "adamw"})
    for steps in (60, 120):
        objective, network = Denoising(dataset, config, GPU), make_network(config, dataset)
        done = train(objective, network, config, tmp_path / "run", Budget(steps=steps), device=GPU)
    assert done.run.step == 120
    drawn = objective.draw(torch.arange(4), slice(0, 4), torch.Generator().manual_seed(0))
    with fast(GPU), torch.inference_mode():
        fresh, learnt = (
            float(objective(one.to(GPU), *(value.to(GPU) for value in drawn)))
            for one in (make_network(config, dataset), done.averaged)
        )
    assert learnt < fresh


def test_a_gpu_that_computes_is_not_lost() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2, 3, device=GPU) @ torch.zeros(2, 3, device=GPU)
    assert not lost(raised.value, GPU)
