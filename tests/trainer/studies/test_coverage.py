"""Precision, recall, density, coverage, KID and Frechet distance against other code, and the command on a toy."""

import json
from pathlib import Path

import prdc
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_evaluator, publish_toys
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder
from trainer.studies.coverage import compare, frechet_distance, kernel_distance


def test_the_figures_equal_those_of_the_authors() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(70, 6, generator=generator)
    pictures = torch.randn(50, 6, generator=generator) * 0.6 + 0.4
    for k in (3, 5):
        theirs = prdc.compute_prdc(reference.double().numpy(), pictures.double().numpy(), k)
        ours = compare(reference.double(), pictures.double(), k)
        for name, value in theirs.items():
            assert getattr(ours, name) == pytest.approx(float(value), abs=1e-12)
        assert 0 < ours.precision < 1
        assert 0 < ours.coverage < 1


class Given(nn.Module):
    """Stands in for the feature network: a picture's features are its own values."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :12].double()


def _different() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator)
    return torch.randn(60, 12, generator=generator) @ mix, torch.randn(40, 12, generator=generator) * 0.5 + 1


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_frechet_distance_equals_that_of_torchmetrics() -> None:
    a, b = _different()
    other = FrechetInceptionDistance(feature=Given(), input_img_size=(3, 2, 2), normalize=True)
    other.set_dtype(torch.float64)
    other.update(a.view(60, 3, 2, 2).double(), real=True)
    other.update(b.view(40, 3, 2, 2).double(), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(other.compute()), rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_kernel_distance_equals_that_of_torchmetrics_and_is_not_biased() -> None:
    a, b = _different()
    other = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=40, normalize=True)
    other.set_dtype(torch.float64)
    other.update(a[:40].view(40, 3, 2, 2).double(), real=True)
    other.update(b.view(40, 3, 2, 2).double(), real=False)
    mean, _ = other.compute()
    assert kernel_distance(a[:40], b) == pytest.approx(float(mean), rel=1e-6)
    generator = torch.Generator().manual_seed(1)
    alike = torch.tensor([kernel_distance(*torch.randn(2, 10, 4, generator=generator)) for _ in range(400)])
    assert abs(float(alike.mean())) < 4 * float(alike.std()) / 400**0.5


def test_the_evaluator_of_any_labels_compares_the_pictures_and_too_many_are_refused(command: Command) -> None:
    publish_toys(Path("models"))
    publish_toy_evaluator(Path("models"), "digits", Vocabulary(("zero", "one")))
    write_data_folder(Path("data"), pictures=48)
    at = ("evaluate", "toy", "--data", "data", "--only", "coverage", "--out", ".")
    publish_toy_evaluator(Path("models"), "course", architecture="resnet18")
    succeeded(command("export", "course", "checkpoint.pth"))
    for evaluator in ("checkpoint.pth", "digits"):
        succeeded(command(*at, "--count", 20, "--evaluator", evaluator))
        rows = {one["measure"]: one for one in json.loads(Path("coverage.json").read_text())["rows"]}
        # random noise resembles none of the flat colours
        assert rows["coverage"]["generated"] == 0 < rows["coverage"]["other"]
        assert all(rows[name]["generated"] > rows[name]["other"] for name in ("KID", "Frechet"))
    refused(command(*at, "--count", 25), "at most 24 pictures: half of those with labels")
