"""Fitting the evaluator: it learns positions, resumes bit for bit, refuses other data, ends once."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from shared.checkpoint import read_info
from shared.diffusion.layouts import OUTSIDE
from shared.evaluator import Evaluator, load_evaluator
from shared.vocabulary import Vocabulary
from tests.trainer_fixtures import write_data_folder
from trainer.averages import warmed_up_average
from trainer.data import Dataset, in_vocabulary, load_dataset
from trainer.errors import TrainerError
from trainer.runs import Budget, Run
from trainer.stages import fit_evaluator as fitting
from trainer.stages.fit_evaluator import fit_evaluator

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_and_saved_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "BATCH", 4)
    monkeypatch.setattr(fitting, "GROUPS", 1)
    monkeypatch.setattr(fitting, "LOG_EVERY", 1)
    monkeypatch.setattr(fitting, "SAVE_EVERY_S", -1.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_data_folder(tmp_path_factory.mktemp("data") / "d", pictures=12), size=64)


def _fit(dataset: Dataset, folder: Path, steps: int, stop_at: int = 0, seed: int = 0) -> tuple[Evaluator, Run]:
    def on_step(run: Run) -> None:
        if run.step == stop_at:
            raise KeyboardInterrupt

    budget = Budget(steps=steps)
    evaluator, _, run = fit_evaluator(dataset, dataset, folder, budget, seed=seed, device=CPU, on_step=on_step)
    return evaluator, run


def test_a_resumed_run_ends_bit_for_bit_the_same(dataset: Dataset, tmp_path: Path) -> None:
    whole, run = _fit(dataset, tmp_path / "whole", 5)
    assert (run.step, run.resumed_at) == (5, 0)
    with pytest.raises(KeyboardInterrupt):
        _fit(dataset, tmp_path / "parts", 5, stop_at=3)  # saved last after step 2
    torch.manual_seed(99)
    again, run = _fit(dataset, tmp_path / "parts", 5)
    assert (run.step, run.resumed_at) == (5, 2)
    wanted, got = whole.state_dict(), again.state_dict()
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 5]
    assert lines[2]["loss"] == lines[3]["loss"]
    assert lines[-1].keys() == {"step", "minutes", "accuracy", "exact_match", "f1"}


@pytest.fixture
def located(dataset: Dataset) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(*dataset.labels.shape, 2, generator=generator)
    return replace(dataset, positions=positions.where(dataset.labels[..., None] > 0, OUTSIDE))


@pytest.mark.parametrize("seed", range(4))
def test_distortions_move_positions_with_the_picture(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A white blot is where its position says, to a twentieth of a pixel; the picture was moved by far more."""
    monkeypatch.setattr(fitting, "DISTORT", v2.CenterCrop(64))
    monkeypatch.setattr(fitting, "TINT", 0.0)
    monkeypatch.setattr(fitting, "GROUPS", 3)
    torch.manual_seed(seed)
    positions = 0.3 + 0.4 * torch.rand(6, 1, 2)
    axis = (torch.arange(64) + 0.5) / 64
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (64, 64, 2): x, y
    blots = torch.exp(-0.5 * ((grid - positions[:, :, None]) * 64 / 2).square().sum(-1))  # (6, 64, 64)
    distorted, moved = fitting.augment(blots[:, None].expand(-1, 3, -1, -1) * 2 - 1, positions)
    seen = (distorted[:, 0] + 1) / 2
    centres = torch.einsum("nhw,hwc->nc", seen, grid) / seen.sum((1, 2))[:, None]
    torch.testing.assert_close(moved[:, 0], centres, rtol=0, atol=0.05 / 64)
    assert float((moved - positions).norm(dim=-1).max()) > 1 / 64


def test_the_position_loss_counts_only_objects_that_are_there() -> None:
    found = torch.tensor([[[0.5, 0.5], [9.0, 9.0]], [[0.25, 0.5], [0.75, 0.5]]])
    wanted = torch.tensor([[[0.75, 0.25], [OUTSIDE, OUTSIDE]], [[0.5, 0.5], [0.75, 0.5]]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    shares = torch.full((2, 2, 4), 1 / 8)  # of heatmaps with 2 x 2 cells
    shares[0, 0, 1] = 5 / 8  # upper right, where (0.75, 0.25) is
    shares[1, 0, 3] = 5 / 8
    shares[1, 1, 3] = 5 / 8  # lower right, where (0.5, 0.5) and (0.75, 0.5) are
    distance, missed = fitting.position_loss((found, shares.log()), wanted, labels)
    assert float(distance) == (0.5 + 0.25 + 0.0) / 3
    assert float(missed) == pytest.approx(-math.log(5 / 8))
    shares[1, 1] = shares[1, 1].flip(0)
    assert float(fitting.position_loss((found, shares.log()), wanted, labels)[1]) == pytest.approx(
        (-2 * math.log(5 / 8) - math.log(1 / 8)) / 3
    )
    assert [float(loss) for loss in fitting.position_loss((found, shares.log()), wanted, torch.zeros(2, 2))] == [0, 0]


def test_with_positions_the_head_is_trained_and_measured(
    located: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "SAVE_EVERY_S", 1e9)
    run, start = tmp_path / "run", Evaluator(located.vocabulary)
    fitted, figures, _ = fit_evaluator(located, located, run, Budget(steps=2), start=start, device=CPU)
    assert fitted.locator is not None
    first, _, last = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    assert first.keys() == {"step", "minutes", "loss", "position_loss"}
    scores = {"accuracy", "exact_match", "f1", "position_error_median", "position_error_mean"}
    assert last.keys() == {"step", "minutes"} | scores
    assert figures.keys() == scores | {"exact_match_of"}
    path = fitting.publish_evaluator(fitted, figures, tmp_path, "judge", {})
    assert read_info(path).training["held_out"] == figures
    again = load_evaluator(path)
    monkeypatch.setattr(fitting, "START_LR", 0.0)
    same, _, _ = fit_evaluator(located, located, tmp_path / "again", Budget(steps=1), start=again, device=CPU)
    assert all(torch.equal(value, wanted) for value, wanted in zip(same.parameters(), again.parameters(), strict=True))
    assert len(list(again.parameters())) == len(list(start.parameters())) + 6


class Knowing(Evaluator):
    """Finds the first label in every picture, at a fifth of the side from its upper left corner along each axis."""

    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        return torch.eye(len(self.vocabulary))[torch.zeros(len(images), dtype=torch.long)]

    def positions(self, images: Tensor, *, batch: int = 64) -> Tensor:
        return torch.full((len(images), len(self.vocabulary), 2), 0.2)


def test_what_is_measured_on_held_out_pictures() -> None:
    vocabulary = Vocabulary(("a", "b"))
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    positions = torch.tensor([[0.2, 0.2], [0.5, 0.6]])[None].repeat(4, 1, 1).where(labels[..., None] > 0, OUTSIDE)
    dataset = Dataset(vocabulary, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), labels, positions)
    figures = fitting.measure(Knowing(vocabulary, locates=True), dataset)
    assert figures["exact_match_of"] == {"1": pytest.approx(2 / 3), "2": 0.0}
    assert figures["exact_match"] == 0.5
    assert figures["position_error_median"] == pytest.approx(0.0)
    assert figures["position_error_mean"] == pytest.approx((0 + 0 + 0.5 + 0 + 0.5) / 5)
    assert "position_error_mean" not in fitting.measure(Knowing(vocabulary), dataset)
    assert "position_error_mean" not in fitting.measure(
        Knowing(vocabulary, locates=True), replace(dataset, positions=None)
    )


def test_the_average_of_a_short_run_forgets_the_random_weights() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    average = AveragedModel(network, multi_avg_fn=warmed_up_average(fitting.EMA_DECAY))
    for weight in [0.0] + [1.0] * 50:
        torch.nn.init.constant_(network.weight, weight)
        average.update_parameters(network)
    assert average.module.weight.item() > 0.999


def test_time_between_two_processes_does_not_count(dataset: Dataset, tmp_path: Path) -> None:
    """A run that has spent nearly all of its minute takes one more step, however long ago it stopped."""
    _fit(dataset, tmp_path, 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["elapsed_s"] = 59.9999
    torch.save(state, tmp_path / "state.pt")
    *_, run = fit_evaluator(dataset, dataset, tmp_path, Budget(minutes=1), device=CPU)
    assert (run.resumed_at, run.step) == (1, 2)


def test_a_finished_run_is_not_trained_further(dataset: Dataset, tmp_path: Path) -> None:
    first, _ = _fit(dataset, tmp_path, 1)
    second, run = _fit(dataset, tmp_path, 1)
    assert run.step == run.resumed_at == 1
    assert torch.equal(first.resnet.conv1.weight, second.resnet.conv1.weight)


def test_other_data_or_another_seed_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    _fit(dataset, tmp_path, 1)
    fewer = replace(dataset, images=dataset.images[:6], labels=dataset.labels[:6])
    with pytest.raises(TrainerError, match=r"state\.pt was started with other data; choose another --run"):
        _fit(fewer, tmp_path, 2, seed=1)


def test_held_out_pictures_with_other_labels_are_refused_before_training(dataset: Dataset, tmp_path: Path) -> None:
    names = dataset.vocabulary.names
    held_out = replace(dataset, vocabulary=Vocabulary(("cat", *names[1:])))
    with pytest.raises(TrainerError, match="the data set does not know labels of the folder: cat"):
        fit_evaluator(dataset, held_out, tmp_path / "run", Budget(steps=1), device=CPU)
    assert not (tmp_path / "run").exists()
    turned = in_vocabulary(dataset, Vocabulary(names[::-1]), "model")
    measured = [
        fit_evaluator(dataset, unseen, tmp_path / str(i), Budget(steps=1), device=CPU)[1]
        for i, unseen in enumerate((dataset, turned))
    ]
    assert measured[0] == measured[1]
