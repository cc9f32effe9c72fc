"""The baselines compute what they claim: the course report's equations, and steps that train."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.baselines.samplers import LabelUNet, ReportSampler, betas_of, pipeline
from benchmarks.baselines.training_loops import diffusers_loop, report_loop
from benchmarks.sections.servers import STEPS
from shared.diffusion.denoise import Stepper, sample
from shared.diffusion.path import NoisePath
from shared.diffusion.schedules import alpha_bar
from shared.options import SamplingOptions
from tests.toy import K, ToyNetwork
from tests.trainer_fixtures import write_data_folder
from trainer.config import TrainConfig
from trainer.data import load_dataset
from trainer.objectives.denoiser import make_network


def test_the_reports_sampler_equals_our_ddpm_table() -> None:
    """Its equations as written and our loop give the same pictures from the same noise."""
    ab = alpha_bar("sigmoid", 1000)
    network = ToyNetwork(ab, "eps")
    labels = torch.eye(K)[:1]
    theirs = ReportSampler(network, ab, "eps", network.image_shape)(labels, 3.0, torch.Generator().manual_seed(5))
    ours = sample(
        Stepper(network, NoisePath(ab, "eps")), labels, SamplingOptions(sampler="ddpm", steps=999, guidance=3.0), [5]
    )
    assert torch.allclose(theirs, ours, atol=2e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
def test_diffusers_calls_the_network_with_as_many_rows_as_our_loop() -> None:
    """For every number of steps that the servers are asked for, with guidance in an interval."""
    ab, labels = alpha_bar("cosine", 1000), torch.eye(K)[:1]
    for steps in STEPS:
        toy = ToyNetwork(ab)
        network = nn.Module()
        network.dtype, network.network, network.forward = torch.float32, toy, toy.__call__
        unet = LabelUNet("v")
        unet.network = network
        pipe = pipeline(SimpleNamespace(prediction="v", alpha_bar=ab), "DPM-Solver++", torch.float32, unet)
        pipe(labels, steps, 3.0, torch.Generator().manual_seed(5), interval=(0.2, 0.55))
        options = SamplingOptions(sampler="dpmpp_2m", steps=steps, guidance=3.0, guidance_interval=(0.2, 0.55))
        ours = Stepper(ToyNetwork(ab), NoisePath(ab, "v")).new_row(labels[0], options, seed=5).network_rows()
        assert [len(call.keep) for call in toy.calls] == ours


def test_betas_reproduce_the_schedule() -> None:
    ab = alpha_bar("cosine", 1000)
    assert torch.allclose((1 - torch.tensor(betas_of(ab), dtype=torch.float64)).cumprod(0), ab, rtol=1e-9)


def test_each_loop_trains_and_reports_every_step(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "data", pictures=4)
    small = {"channels": (8,), "encoder_blocks": (1,), "decoder_blocks": (1,), "attention": (False,)}
    config = TrainConfig(batch=2, image_size=8, network=small)
    for loop in (report_loop, partial(diffusers_loop, mixed_precision="no")):
        network, steps = make_network(config, load_dataset(folder, size=8)), list[int]()
        before = [parameter.detach().clone() for parameter in network.parameters()]
        loop(network, folder, config, steps=3, on_step=partial(steps.append, 1))
        assert len(steps) == 3
        assert not all(map(torch.equal, before, network.parameters()))
    with pytest.raises(ValueError, match="fewer pictures than a batch of 8"):
        report_loop(network, folder, config.model_copy(update={"batch": 8}), 1)
