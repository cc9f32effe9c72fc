"""The contract of all objectives: runs resume bit for bit, and processes draw their shares of one batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.diffusion.model import load_denoiser
from shared.options import SamplingOptions
from tests.toy_checkpoint import publish_toys
from tests.trainer.test_positions import rendered
from tests.trainer_fixtures import TINY
from trainer import train as training
from trainer.config import RunConfig
from trainer.data import load_dataset
from trainer.objectives import denoiser, distilled, evaluator, layouts
from trainer.runs import Budget, Run
from trainer.train import Objective, batch_indices, train

CPU = torch.device("cpu")
Made = tuple[Objective, nn.Module, RunConfig]


def of_denoiser(folder: Path) -> Made:
    dataset = rendered(folder / "data")
    return denoiser.Denoising(dataset, TINY, CPU), denoiser.make_network(TINY, dataset), TINY


def of_evaluator(folder: Path) -> Made:
    rendered(folder / "data")
    dataset, config = load_dataset(folder / "data", size=64), evaluator.RUN.model_copy(update={"batch": 4})
    return evaluator.Recognising(dataset, dataset), evaluator.make_network(dataset, 0), config


def of_layouts(folder: Path) -> Made:
    dataset, config = rendered(folder / "data"), layouts.LayoutsConfig(network={"cells": 8})
    assert dataset.positions is not None
    objective = layouts.Arranging(dataset.positions, dataset.vocabulary, config)
    return objective, layouts.make_network(objective), config


def of_adapter(folder: Path) -> Made:
    publish_toys(folder)
    teacher, config = load_denoiser(folder / "toy.safetensors"), distilled.RUN.model_copy(update={"batch": 2})
    sampling = SamplingOptions(sampler="ddim", steps=2, guidance=1.0)
    pool = distilled.trajectories(
        teacher, teacher.stepper(), torch.eye(len(teacher.vocabulary))[:3], [1, 2, 3], 1, sampling
    )
    network, base = distilled.make_student(teacher, folder, 2, 0)
    return distilled.Distilling(pool, teacher, base, sampling, CPU), network, config


class StopError(Exception):
    """Interrupts a run."""


EACH = pytest.mark.parametrize("make", [of_denoiser, of_evaluator, of_layouts, of_adapter])


@EACH
def test_processes_draw_their_shares_of_the_same_batch(tmp_path: Path, make: Callable[[Path], Made]) -> None:
    objective, _, _ = make(tmp_path)
    index = batch_indices(len(objective), 12, seed=0, step=1)
    whole, *parts = (
        objective.draw(index, share, torch.Generator().manual_seed(7))
        for share in (slice(0, 12), slice(0, 6), slice(6, 12))
    )
    for one, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat(pieces))


@EACH
def test_a_resumed_run_ends_bit_for_bit_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Made]
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)

    def stop(run: Run) -> None:
        if run.step == 3:  # saved last after step 2
            raise StopError

    def run(name: str, **options: Any) -> nn.Module:
        torch.manual_seed(ord(name[0]))
        objective, network, config = make(tmp_path)
        with layouts.one_thread():
            return train(objective, network, config, tmp_path / name, Budget(steps=4), device=CPU, **options).averaged

    whole = run("whole").state_dict()
    with pytest.raises(StopError):
        run("parts", on_step=stop)
    again = run("parts").state_dict()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
