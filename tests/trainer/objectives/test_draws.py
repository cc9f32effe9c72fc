"""The contract of all objectives: processes draw their shares of one batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.diffusion.model import load_denoiser
from shared.options import SamplingOptions
from tests.toy_checkpoint import publish_toys
from tests.trainer.test_positions import rendered
from tests.trainer_fixtures import TINY
from trainer.data import load_dataset
from trainer.objectives import denoiser, distilled, evaluator, layouts
from trainer.train import Objective, batch_indices

CPU = torch.device("cpu")


def of_denoiser(folder: Path) -> Objective:
    return denoiser.Denoising(rendered(folder / "data"), TINY, CPU)


def of_evaluator(folder: Path) -> Objective:
    rendered(folder / "data")
    dataset = load_dataset(folder / "data", size=64)
    return evaluator.Recognising(dataset, dataset)


def of_layouts(folder: Path) -> Objective:
    dataset = rendered(folder / "data")
    assert dataset.positions is not None
    return layouts.Arranging(dataset.positions, dataset.vocabulary, layouts.LayoutsConfig(network={"cells": 8}))


def of_adapter(folder: Path) -> Objective:
    publish_toys(folder)
    teacher, sampling = load_denoiser(folder / "toy.safetensors"), SamplingOptions(sampler="ddim", steps=2, guidance=1)
    labels = torch.eye(len(teacher.vocabulary))[:3]
    pool = distilled.trajectories(teacher, teacher.stepper(), labels, [1, 2, 3], 1, sampling)
    return distilled.Distilling(pool, teacher, sampling, CPU)


@pytest.mark.parametrize("make", [of_denoiser, of_evaluator, of_layouts, of_adapter])
def test_processes_draw_their_shares_of_the_same_batch(tmp_path: Path, make: Callable[[Path], Objective]) -> None:
    """All randomness is the generator's, so a resumed run also draws what one that was not interrupted would."""
    objective = make(tmp_path)
    index = batch_indices(len(objective), 12, seed=0, step=1)
    whole, *parts = (
        objective.draw(index, share, torch.Generator().manual_seed(7))
        for share in (slice(0, 12), slice(0, 6), slice(6, 12))
    )
    for one, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat(pieces))
